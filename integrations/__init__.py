"""What torchwrap knows about other people's models, one package per framework.

The core holds no name of a framework's class. Whatever has to be known about one (where its repeated blocks are, which weights are
tied, how its checkpoints are laid out) is here, and is imported only when a model of that framework turns up. Importable as
`torchwrap.integrations.<framework>`; a third party adds its own through the entry point group `torchwrap.integrations`.
"""

__all__: list[str] = []
