"""{{ cookiecutter.class_name }}, a plugin for lightning-stable. Importing this imports nothing heavy."""
