"""Random hostile input by the million: ``cd tests && python -m fuzz --help`` (``make fuzz``)."""
