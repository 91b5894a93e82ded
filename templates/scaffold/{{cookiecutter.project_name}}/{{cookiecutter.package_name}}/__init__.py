"""The model and the data of {{ cookiecutter.project_name }}."""
