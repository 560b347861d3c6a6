"""The settings of the three handlers."""

from decimal import Decimal
from typing import Annotated

from msgspec import Meta

from adapter.plugin import Secret, Settings, Url


class Access(Settings, frozen=True, kw_only=True):
    """The address of the ERP, and our credentials."""

    url: Annotated[Url, Meta(description="Where the ERP is. The handlers reach only this host.")]
    token: Annotated[Secret, Meta(description="Our token, by reference.")]

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token.reveal()}"}


class ExportSettings(Settings, frozen=True, kw_only=True):
    """The settings of `erp-export`."""

    erp: Annotated[Access, Meta(description="Access to the ERP.")]
    company: Annotated[int, Meta(ge=1, description="Number of the company in the ERP.")]
    terms: Annotated[dict[str, str], Meta(description="Terms of payment in the ERP, by the adapter id of the payment.")]


class StockSettings(Settings, frozen=True, kw_only=True):
    """The settings of `erp-stock`."""

    erp: Annotated[Access, Meta(description="Access to the ERP.")]


class Band(Settings, frozen=True, kw_only=True):
    """The freight of a cart that costs at least so much. Amounts include VAT, in the major unit of the currency."""

    cart: Annotated[Decimal, Meta(description="Least total of the cart.")]
    freight: Annotated[Decimal, Meta(description="The freight.")]

    def __post_init__(self) -> None:
        if not (self.cart >= 0 and self.freight >= 0):
            raise ValueError("cart and freight must be zero or more")


class FreightSettings(Settings, frozen=True, kw_only=True):
    """The settings of `erp-freight`."""

    bands: Annotated[tuple[Band, ...], Meta(min_length=1, description="The freight by the total of the cart.")]

    def __post_init__(self) -> None:
        if min(band.cart for band in self.bands) > 0:
            raise ValueError("bands needs one for small carts, with cart: 0")
