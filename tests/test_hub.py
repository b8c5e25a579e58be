"""Uploads against a server of our own that speaks the hub's protocol: what arrives, what is refused, what is said."""

import base64
import json
import re

import huggingface_hub
import pytest
from huggingface_hub import constants
from json_server import JsonHandler, serving
from test_convert_model import random_model

from model import hub
from model.loading import save_weights
from model.record import write_record
from scripts.convert_model import main

TOKEN = "hf_averysecrettoken0123456789abcdefgh"


class Hub(JsonHandler):
    """One repository, me/x. The server's `answers` replace what it says: path -> status, or None to hang up."""

    def do_GET(self):
        if self.fails():
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid username or password."})
        repo = self.server.repo
        if self.path == "/api/whoami-v2":
            self.say(200, {"type": "user", "name": "me"})
        elif repo is None:
            self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.say(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in repo["files"]])
        else:
            siblings = [{"rfilename": name} for name in repo["files"]]
            self.say(200, {"id": "me/x", "private": repo["private"], "siblings": siblings, "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.fails():
            return
        server = self.server
        if self.path == "/api/repos/create":
            if server.repo is not None:
                return self.say(409, {"error": "You already created it", "url": f"{server.address}/me/x"})
            asked = json.loads(body)
            is_private = asked.get("visibility") == "private" or asked.get("private", False)
            server.repo = {"private": is_private, "files": {".gitattributes": b""}}
            self.say(200, {"url": f"{server.address}/me/x"})
        elif self.path == "/api/validate-yaml":  # of a README.md
            self.say(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.say(200, {"files": files})
        else:
            server.commits += 1
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.repo["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del server.repo["files"][value["path"]]
            self.say(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{server.address}/me/x/commit/0"})

    def fails(self) -> bool:
        """Whether the test wants another answer to this request, which is then given."""
        for start, status in self.server.answers.items():
            if self.path.startswith(start) or f"/{start}/" in self.path:
                if status is None:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.say(status, {"error": f"No, because of {status}"})
                return True
        return False


@pytest.fixture
def server(monkeypatch):
    with serving(Hub) as server:
        server.repo, server.answers, server.commits = None, {}, 0
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()  # one that was made offline would stay so
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "MiniMind2-Tiny"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("# Tiny")
    return path


def push(path, *, names=None, beside=(), private=False, replace=False) -> str:
    hub.check_upload("huggingface", "me/x", names, private, replace)
    return hub.upload("huggingface", "me/x", path, list(beside), private=private, replace=replace)


def test_what_was_converted_arrives_byte_for_byte(server, tmp_path, capsys):
    model = random_model()
    save_weights(model.state_dict(), tmp_path / "m.pth")
    write_record(tmp_path / "m.pth", model.config)
    main([str(tmp_path / "m.pth"), str(tmp_path / "folder"), "--push", "me/x", "--private"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{server.address}/me/x"
    sent = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sent.keys()
    assert server.repo == {"private": True, "files": {".gitattributes": b"", **sent}} and server.commits == 1
    main([str(tmp_path / "m.pth"), str(tmp_path / "m.gguf"), "--push", "me/x"])  # beside it
    assert server.repo["files"].keys() == {".gitattributes", *sent, "m.gguf", "m.Modelfile"}


def test_nothing_is_sent_of_a_conversion_that_fails(server, tmp_path, monkeypatch, capsys):
    save_weights(random_model().state_dict(), tmp_path / "m.pth")
    monkeypatch.setattr("model.conversion.compare", lambda *_: 1.0)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "m.pth"), str(tmp_path / "folder"), "--push", "me/x"])
    assert "computes other logits" in capsys.readouterr().err and server.repo is None


def test_what_is_in_the_way_stays_unless_it_is_to_be_replaced(server, folder, tmp_path):
    server.repo = {"private": False, "files": {".gitattributes": b"", "README.md": b"old", "old.bin": b"weights"}}
    with pytest.raises(hub.HubError, match="me/x holds old.bin: choose another name, or replace all with --replace"):
        push(folder)
    gguf = tmp_path / "old.bin"  # a file may lie beside others, but not in the place of one
    gguf.write_bytes(b"new")
    with pytest.raises(hub.HubError, match="me/x holds old.bin: choose another name, or replace these"):
        push(gguf, names=["old.bin", "x.Modelfile"])
    with pytest.raises(hub.HubError, match="me/x is there and public"):
        push(folder, private=True)
    assert server.commits == 0
    push(gguf, names=["old.bin", "x.Modelfile"], replace=True)
    assert server.repo["files"] == {".gitattributes": b"", "README.md": b"old", "old.bin": b"new"}
    push(folder, replace=True)
    assert server.repo["files"] == {".gitattributes": b"", "README.md": b"# Tiny", "config.json": b"{}"}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"/api/whoami-v2": 401}, "knows no such token (mistyped, revoked or expired): hf auth login, or set HF_TOKEN"),
        ({"/api/repos/create": 403}, "does not let this token write to me/x: take one with write access"),
        ({"preupload": 403}, "does not let this token write to me/x"),
        ({"commit": 409}, "is just being changed"),
        ({"commit": 413}, "huggingface answers 413 to me/x"),
        ({"commit": None}, "no connection to huggingface, or it broke"),
        ({"/api/whoami-v2": None}, "try again later, convert without --push, or set HF_ENDPOINT to a mirror"),
    ],
    ids=str,
)
def test_refusals_are_plain_and_name_what_to_do(server, folder, monkeypatch, answers, reason):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again
    server.answers = answers
    with pytest.raises(hub.HubError, match=re.escape(reason)) as error:
        push(folder)
    assert server.commits == 0 and TOKEN not in str(error.value) and "\n" not in str(error.value)
    if "/api/whoami-v2" not in answers:
        assert f"{folder} is whole: `hf upload me/x {folder} .` uploads it as it is" in str(error.value)
    server.answers = {}
    assert push(folder) == f"{server.address}/me/x"  # what was begun is no obstacle


def test_without_a_token_the_login_is_named(server, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(hub.HubError, match="there is no token of huggingface on this machine: hf auth login"):
        push(folder)


def test_what_is_already_converted_comes_with_the_command_that_uploads_it(server, tmp_path, capsys):
    save_weights(random_model().state_dict(), tmp_path / "m.pth")
    for name in ("my model", "m.gguf"):
        main([str(tmp_path / "m.pth"), str(tmp_path / name)])
        with pytest.raises(SystemExit):
            main([str(tmp_path / "m.pth"), str(tmp_path / name), "--push", "me/x"])
        told = capsys.readouterr().err
        if name == "m.gguf":
            assert f"run `hf upload me/x {tmp_path}/m.gguf && hf upload me/x {tmp_path}/m.Modelfile`" in told
        else:
            assert f"run `hf upload me/x '{tmp_path}/my model' .`" in told


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--push", "x"], "--push x: must be OWNER/NAME"),
        (["--private"], "--private and --replace are about --push"),
        (["--push", "me/x", "--hub", "github"], "--hub"),
        (["--license", "Apache 2"], "--license Apache 2: must be an identifier of the hub, e.g. apache-2.0"),
        (["--license", "mit", "--to", "pth"], "--license mit: only a folder has a model card"),
    ],
)
def test_flags_that_make_no_sense(capsys, flags, reason):
    with pytest.raises(SystemExit):
        main(["m.pth", "x", *flags])
    assert reason in capsys.readouterr().err


def test_the_command_for_a_private_repository_makes_no_public_one(tmp_path):
    assert hub.upload_command("huggingface", "me/x", [tmp_path], True) == f"hf upload me/x {tmp_path} . --private"
    create, upload = hub.upload_command("modelscope", "me/x", [tmp_path], True).split(" && ")
    assert "me/x" in create and "--visibility private" in create
    assert upload == f"modelscope upload me/x {tmp_path}"
