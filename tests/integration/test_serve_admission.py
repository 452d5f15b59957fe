"""Admission by the names of models: what the routers are asked, and under which name."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from serve_app.core.inference import AdmitRequest
from serve_app.settings import Settings

TWO = [{"name": "small", "path": "/s", "aliases": ["gpt-small"]}, {"name": "org/large"}]


@dataclass
class FakeHandle:
    """Notes what the router is asked, and under which session."""

    asked: list[tuple[str, str]] = field(default_factory=list)
    session: str = ""

    @property
    def admit(self) -> "FakeHandle":
        return self

    def options(self, *, session_id: str) -> "FakeHandle":
        return FakeHandle(self.asked, session_id)

    async def remote(self, request: AdmitRequest) -> None:
        self.asked.append((self.session, request.model))


async def test_a_model_has_one_queue_by_whichever_name_it_is_asked_for() -> None:
    with warnings.catch_warnings():  # Ray's own, at its import
        warnings.simplefilter("ignore")
        from serve_app.adapters.serve_admission import ServeAdmission  # noqa: PLC0415
    handle: Any = FakeHandle()
    admission = ServeAdmission(handle, Settings(models=TWO).own_names)
    for name in ("", "gpt-small", "small", "org/large", "nobody"):
        await admission.admit(AdmitRequest("r", name, 1))
    known = [("small", "small")] * 3 + [("org/large", "org/large")]
    assert handle.asked == [*known, ("nobody", "nobody")]
