"""The bundled handlers pass the conformance suites that the authors of plugins get."""

from adapter.testing.bundled import (
    HttpConformance,
    JetshopConformance,
    LogConformance,
    PatchConformance,
    QuestionConformance,
    RefusalConformance,
    RulesConformance,
)


class TestHttp(HttpConformance):
    pass


class TestQuestion(QuestionConformance):
    pass


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
