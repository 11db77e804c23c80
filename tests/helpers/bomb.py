"""A pickle that does something when it is loaded."""


class Bomb:
    """An object whose pickle, when it is loaded, creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")
