"""Ready LightningModules that the packaged templates name."""
