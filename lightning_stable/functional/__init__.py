"""The maths of the methods: torch only, pure functions over tensors and numbers, one file a method."""
