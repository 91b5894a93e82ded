"""The contracts of lightning-stable, as a plugin of pytest."""

pytest_plugins = ["lightning_stable.testing.plugin"]
