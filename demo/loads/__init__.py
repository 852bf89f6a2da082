"""Code that loads models from a directory, as anybody writes it: nothing here knows modelfs.

Each module has ``load(directory)``, which returns the model, and ``use(model)``, which returns one line about
what it computes. ``python -m demo.loads MODULE DIRECTORY`` runs one of them.
"""
