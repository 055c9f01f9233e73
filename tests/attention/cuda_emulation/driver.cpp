// A stand-in for libcuda.so.1 that keeps what it was called with. Signatures as in cuda.h; cuModuleLoadData refuses what is no ELF file.
#include <cstring>

namespace {
char last_arguments[4096];
unsigned last_shape[7];
void* last_stream;
int loads, contexts;
thread_local void* current_context;
}  // namespace

extern "C" {
int cuDeviceGet(int* handle, int ordinal) { return *handle = ordinal, 0; }
int cuCtxGetCurrent(void** context) { return *context = current_context, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(0x100L + device), ++contexts, 0; }
int cuCtxSetCurrent(void* context) { return current_context = context, 0; }
int cuModuleLoadData(void** module, const void* image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return 200;
    return *module = reinterpret_cast<void*>(0x200L), ++loads, 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    if (std::strcmp(name, "attention") != 0) return 500;
    return *function = reinterpret_cast<void*>(0x123456789abcL), 0;
}
int cuGetErrorString(int code, const char** text) { return *text = code == 500 ? "named symbol not found" : "device kernel image is invalid", 0; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void** extra) {
    if (function != reinterpret_cast<void*>(0x123456789abcL) || extra) return 400;
    if (!current_context) return 201;
    const unsigned shape[7] = {gx, gy, gz, bx, by, bz, shared};
    std::memcpy(last_shape, shape, sizeof shape);
    std::memcpy(last_arguments, arguments[0], 512);
    last_stream = stream;
    return 0;
}
unsigned* shape() { return last_shape; }
char* arguments() { return last_arguments; }
void* stream() { return last_stream; }
int load_count() { return loads; }
int context_count() { return contexts; }
}
