"""What tests of nodes hand in instead of the host's own."""

PACK = "pack_under_test"  # the name that the pack is loaded under


class Cancelled(BaseException):
    """The host's interrupt, which newer hosts do not derive from Exception."""


class Joint:
    """Several tensors travelling as one, as core's NestedTensor does."""

    is_nested = True

    def __init__(self, *tensors):
        self.tensors = list(tensors)

    def unbind(self):
        return self.tensors


def first_value(item):
    return item.default if item.default is not None else (item.options or [""])[0]
