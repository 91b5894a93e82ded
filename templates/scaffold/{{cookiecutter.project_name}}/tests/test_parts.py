{% include cookiecutter.task ~ "/test_parts.py" %}
