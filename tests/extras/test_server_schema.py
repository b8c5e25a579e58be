"""Bodies that schemathesis makes from the server's own description of its fields: never an internal error."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the helpers of the other tests

from served import served  # noqa: E402

from inference.server.protocol import ChatRequest, CompletionRequest  # noqa: E402

schemathesis = pytest.importorskip("schemathesis")
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
NEEDED = ("prompt", "input")
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})
MANY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_no_body_breaks_the_server(server, path):
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    statuses = set()

    @MANY
    @given(schema[path]["POST"].as_strategy(), st.sets(st.sampled_from(FIELDS)))
    def ask(case, kept):
        # With all fields at once something is always wrong.
        body = {name: value for name, value in case.body.items() if name in NEEDED or name in kept}
        body["model"] = "minimind"
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
        if path != "/v1/embeddings":
            body["max_tokens"] = 2
        answer = server.http.post(path, json=body, timeout=10)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 413), (answer.status_code, answer.text, body)

    ask()
    assert 200 in statuses
    assert server.http.get("/health").status_code == 200
