"""The machines that run a `Plan`. Add one here and in `dispatch.py`."""
