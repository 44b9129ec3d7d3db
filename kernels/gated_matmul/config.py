"""Static description of a call."""

from kernels.common.product_request import ProductRequest


class Request(ProductRequest):
    """A call as dispatch sees it: gate and value are the two parts of the matrix."""
