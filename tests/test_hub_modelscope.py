"""Uploads to modelscope.cn against a server of our own: the client is its own, so is the protocol."""

import base64
import json

import pytest
from json_server import JsonHandler, serving

from model import hub

TOKEN = "ms-averysecrettoken"


class ModelScope(JsonHandler):
    """One repository, me/x; `refuse` is a status for every request that changes something."""

    def do_GET(self):
        repo, path = self.server.repo, self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.say(401, {"Code": 401, "Message": "unauthorized"})
        elif path == "/openapi/v1/users/me":
            self.say(200, {"success": True, "data": {"username": "me"}})
        elif repo is None or path.startswith("/openapi/"):  # the older surface knows private ones too
            self.say(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        elif path.endswith("/repo/files"):
            files = [{"Path": name, "Type": "blob"} for name in repo["files"]]
            self.say(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            self.say(200, {"Code": 200, "Success": True, "Data": {"Name": "x", "Visibility": repo["visibility"]}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server, asked = self.server, json.loads(body)
        if server.refuse:
            self.say(server.refuse, {"Code": server.refuse, "Message": "no", "Success": False})
        elif self.path == "/api/v1/models":
            if server.repo is None:
                server.repo = {
                    "visibility": asked["Visibility"],
                    "files": {"README.md": b"", "configuration.json": b""},
                }
            self.say(200, {"Code": 200, "Success": True, "Data": {}})
        elif "/lfs/" in self.path:
            self.say(200, {"Code": 200, "Success": True, "Data": {"objects": []}})  # it has them all
        else:
            for action in asked["actions"]:
                server.repo["files"].pop(action["path"], None)
                if action["action"] != "delete":
                    is_small = action["type"] == "normal"
                    server.repo["files"][action["path"]] = base64.b64decode(action["content"]) if is_small else b"large"
            self.say(200, {"Code": 200, "Success": True, "Data": {}})

    do_PUT = do_POST


@pytest.fixture
def server(monkeypatch):
    with serving(ModelScope) as server:
        server.repo, server.refuse = None, None
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        yield server


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "MiniMind2-Tiny"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("# Tiny")
    (path / "model.safetensors").write_bytes(bytes(100))
    return path


def push(path, *, private=False, replace=False) -> str:
    hub.check_upload("modelscope", "me/x", None, private, replace)
    return hub.upload("modelscope", "me/x", path, [], private=private, replace=replace)


def test_a_folder_arrives_and_is_replaced_on_request_only(server, folder):
    assert push(folder, private=True) == f"{server.address}/models/me/x"
    sent = {"config.json": b"{}", "README.md": b"# Tiny", "model.safetensors": b"large"}
    assert server.repo == {"visibility": 1, "files": {"configuration.json": b"", **sent}}
    assert sorted(path.name for path in folder.iterdir()) == sorted(sent)  # the client left nothing there
    (folder / "config.json").write_text("{1}")
    with pytest.raises(
        hub.HubError, match="me/x holds config.json, model.safetensors: choose another name, or replace"
    ):
        push(folder)
    assert server.repo["files"]["config.json"] == b"{}"
    push(folder, private=True, replace=True)
    assert server.repo["files"]["config.json"] == b"{1}"
    server.repo["visibility"] = 5
    with pytest.raises(hub.HubError, match="me/x is there and public"):
        push(folder, private=True, replace=True)


@pytest.mark.parametrize(("status", "reason"), [(401, "knows no such token"), (403, "does not let this token write")])
def test_refusals_are_plain(server, folder, status, reason):
    server.refuse = status
    with pytest.raises(hub.HubError, match=reason) as error:
        push(folder)
    assert TOKEN not in str(error.value) and f"modelscope upload me/x {folder}" in str(error.value)


def test_a_wrong_token_names_the_login(server, folder, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "wrong")
    with pytest.raises(hub.HubError, match="no such token .*: modelscope login --token TOKEN, or set MODELSCOPE_API_T"):
        push(folder)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(hub.HubError, match="there is no token of modelscope on this machine: modelscope login"):
        push(folder)


def test_no_connection_is_told(server, folder, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(hub.HubError, match="no connection to modelscope, or it broke"):
        push(folder)
