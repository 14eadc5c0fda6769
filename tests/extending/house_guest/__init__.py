"""A package outside nemo_srl that adds one of everything that varies. docs/extending.md explains its files.

No file of nemo_srl knows of this package. It is chosen by dotted paths, such as `engine=house_guest.engine`.
"""
