"""Static description of a call."""

from kernels.common.product_request import ProductRequest


class Request(ProductRequest):
    """A call as dispatch sees it."""

    def __str__(self) -> str:
        return f"R{self.rows} D{self.width} F{self.features} P{self.parts} {self.dtype} on {self.device}"
