"""Layers as functions of a `Pass`: which kernels run forward, backward and their tangents."""
