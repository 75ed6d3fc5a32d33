"""Follows the image's Dockerfile in a plain Debian tree, where there is no container engine.

``python -m cluster.image.rehearsal``, as root, with debootstrap: reads the Dockerfile, runs its
steps in chroots, and starts what comes out as a container would be started. What it can't show:
that the base image is as debootstrap's tree, and how an engine stores layers.
"""
