"""The ``lightning-stable`` command, a thin layer over LightningCLI."""
