"""Import paths of earlier versions, such as ``mindiffedit.kernels``; ``mindiffedit.__path__`` leads here."""
