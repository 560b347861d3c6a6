"""The bundled handlers pass the conformance suites that the authors of plugins get."""

from adapter.testing.bundled import (
    JetshopConformance,
    LogConformance,
    PatchConformance,
    RefusalConformance,
    RulesConformance,
)


class TestJetshop(JetshopConformance):
    pass


class TestLog(LogConformance):
    pass


class TestPatch(PatchConformance):
    pass


class TestRules(RulesConformance):
    pass


class TestRefusals(RefusalConformance):
    pass
