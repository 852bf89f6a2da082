"""``make demo``: real models from two stores, mounted on ./models and loaded by unmodified code.

A program of the checkout, not of the package: the models are those of ``tests.zoo``.

- ``__main__``: the story that is told.
- ``models``: what is mounted and how it is loaded.
- ``loads``: the loading code; each module is what a user of the library would write.
- ``stores``: a process with a Hub and an S3 server, which also cleans up, however the story ends.
- ``session``: the processes that the story starts.
- ``screen``: how it looks.
"""
