"""The conformance suites: `norce-adapter handlers list --conformance` runs them, and so do the tests."""

from adapter.testing import HandlerConformance, HookConformance, ValidationConformance
from norce_adapter_erp.export import ErpExport
from norce_adapter_erp.freight import Freight
from norce_adapter_erp.stand_in import StandIn
from norce_adapter_erp.stock import StockCheck

ERP = {"url": "https://erp.example/api", "token": "a-token"}


class ExportConformance(HandlerConformance[ErpExport]):
    """The suite of `erp-export`."""

    settings = {"erp": ERP, "company": 7, "terms": {"klarna_checkout_adapter": "K30"}}
    system = StandIn


class StockConformance(ValidationConformance[StockCheck]):
    """The suite of `erp-stock`."""

    settings = {"erp": ERP}
    system = StandIn


class FreightConformance(HookConformance[Freight]):
    """The suite of `erp-freight`."""

    settings = {"bands": [{"cart": 0, "freight": 79}, {"cart": 5000, "freight": 0}]}
    target = "/shippings"
