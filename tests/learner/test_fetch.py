"""`cotwin fetch` against a server on loopback that speaks the hub's protocol and holds small stand-ins."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from learner.fetch import RELEASED, home, main

NAME, COMMIT = "RLinf-Pi05-SFT", "c0ffee" * 6 + "c0ff"
WEIGHTS = bytes(range(256)) * 4096 * 12  # 12 MiB: the library goes on from whole pieces of 10 MB
FILES = {"model.safetensors": WEIGHTS, "physical-intelligence/libero/norm_stats.json": b'{"norm_stats": {}}'}


class Hub(BaseHTTPRequestHandler):
    """One model repository. `breaks`: how often a download of the weights ends in the middle; `spoiled`: whether it is
    of the right length and wrong."""

    protocol_version = "HTTP/1.1"
    breaks, spoiled, asked = 0, False, []

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def answer(self, with_body):
        type(self).asked.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/RLinf/{NAME}/revision/"):
            self.whole(json.dumps(information()).encode(), "application/json", with_body)
        elif path.startswith(f"/api/models/RLinf/{NAME}/tree/{COMMIT}"):
            self.whole(json.dumps(tree()).encode(), "application/json", with_body)
        elif path.startswith(f"/RLinf/{NAME}/resolve/{COMMIT}/"):
            self.file(path.split(f"/resolve/{COMMIT}/")[1], with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def whole(self, body, kind, with_body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def file(self, name, with_body):
        content, hub = FILES[name], type(self)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if "Range" in self.headers else 200)
        for key, value in {
            "ETag": f'"{etag(content)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - start),
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        if hub.spoiled:
            content = bytes(len(content))
        if hub.breaks and content is WEIGHTS:
            hub.breaks -= 1
            self.wfile.write(content[start : start + 11_000_000])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])


def etag(content):
    if content is WEIGHTS:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def information():
    siblings = []
    for name, content in FILES.items():
        entry = {"rfilename": name, "size": len(content), "blobId": etag(content)}
        if content is WEIGHTS:
            entry |= {"blobId": "0" * 40, "lfs": {"sha256": etag(content), "size": len(content), "pointerSize": 134}}
        siblings.append(entry)
    return {"id": f"RLinf/{NAME}", "modelId": f"RLinf/{NAME}", "sha": COMMIT, "siblings": siblings, "tags": []}


def tree():
    files = []
    for name, content in FILES.items():
        entry = {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
        if content is WEIGHTS:
            entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 134}
        files.append(entry)
    return files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    kind = type("OneHub", (Hub,), {"breaks": 0, "spoiled": False, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    # Read once, by whoever imported the library first, who may have been offline:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield kind
    server.shutdown()
    server.server_close()


def test_everything_arrives_where_it_is_expected_and_is_not_fetched_again(hub, tmp_path, capsys):
    assert main([NAME]) == 0
    folder = tmp_path / "models" / NAME
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())
    said = capsys.readouterr().out
    assert f"cotwin sft policy=pi05 checkpoint=models/{NAME} statistics=checkpoint" in said
    assert "libero_*_openpi_pi05" in said
    hub.asked.clear()
    assert main([NAME]) == 0
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_a_broken_download_goes_on_where_it_was(hub, tmp_path):
    hub.breaks = 1
    while main([NAME, f"to={tmp_path / 'here'}"]):  # the library tries again by itself, or the same command does
        assert hub.breaks == 0
    assert (tmp_path / "here/model.safetensors").read_bytes() == WEIGHTS
    ranges = [sent for method, path, sent in hub.asked if method == "GET" and path.endswith("model.safetensors")]
    assert any(sent and int(re.match(r"bytes=(\d+)-", sent)[1]) > 0 for sent in ranges)


def test_a_file_that_is_not_what_was_published_is_refused_and_fetched_anew(hub, tmp_path, capsys):
    hub.spoiled = True
    assert main([NAME]) == 1
    assert "model.safetensors has another SHA-256" in (told := capsys.readouterr().err)
    assert "norm_stats.json has another git hash" in told
    assert not (tmp_path / "models" / NAME / "model.safetensors").exists()
    hub.spoiled = False
    assert main([NAME]) == 0
    assert (tmp_path / "models" / NAME / "model.safetensors").read_bytes() == WEIGHTS


def test_what_the_server_lacks_or_nobody_knows_is_named(hub, capsys):
    assert main(["RLinf-Pi0-SFT-Long"]) == 1
    assert "RLinf/RLinf-Pi0-SFT-Long from http://127.0.0.1" in capsys.readouterr().err
    assert main(["RLinf-Pi05-SFTT"]) == 1
    assert "Did you mean 'RLinf-Pi05-SFT'" in capsys.readouterr().err
    assert main([NAME, "too=x"]) == 1
    assert "allowed are to and revision" in capsys.readouterr().err


def test_homes_follow_the_documented_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert home("RLCo-Example-Real-Data") == tmp_path / "RLCo-Example-Real-Data"
    assert {released.kind for released in RELEASED.values()} == {"model", "dataset"}
