"""The OpenAPI document is true: whatever it lets a client send, nothing is answered that it does not say."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pyrosome.server.keys.store import Store
from tests.server.keys.serving import guarded

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
PUBLIC = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/models", "/v1/models/{model}", "/v1/sessions", "/tokenize", "/detokenize", "/health", "/metrics", "/plan",
    "/account/me", "/account/keys", "/account/sign-up", "/admin/accounts", "/admin/keys", "/admin/invites",
    "/admin/usage",
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    folder = Path(tempfile.mkdtemp())
    store = Store(f"sqlite:///{folder / 'server.db'}")
    with guarded(store, state_path=str(folder), sign_up=True) as found:
        yield found


def document(server):
    with server.client() as client:
        return client.get("/openapi.json").json()


def test_every_path_is_in_it_once_with_what_it_takes_and_answers(server):
    found = document(server)["paths"]
    assert set(found) >= PUBLIC
    assert not [p for p in found if p.startswith(("/beta", "/anthropic"))], "an alias"
    for path, methods in found.items():
        for method, route in methods.items():
            assert route.get("summary"), (path, method)
            assert {"200", "201"} & set(route["responses"]), (path, method)
            if path.startswith("/v1/") and method == "post" and not path.endswith(("/import", "/revoke")):
                schema = route["requestBody"]["content"]["application/json"]["schema"]
                assert schema["properties"], (path, method)


def test_no_request_of_its_kind_gets_a_fault_or_an_answer_it_does_not_name(server, tmp_path):
    _, key = server.key(name="everything")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", CHECKS,
        "--max-examples", "4", "--seed", "7", "--phases", "examples,coverage,fuzzing", "--no-color", "-H",
        f"Authorization: Bearer {key}", "--exclude-path-regex", "^/(admin|account)/keys/.*/(revoke|rotate)",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
