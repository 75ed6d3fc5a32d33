"""The Open Inference Protocol, version 2, over HTTP: what tritonclient and KServe's client speak.

The protocol is JSON; with its extension for binary data a JSON head, whose length is in a header,
and the bytes of tensors after it. All but ``routes`` is pure functions of bytes and arrays.
"""
