"""Tests of what the library knows about other frameworks' models."""
