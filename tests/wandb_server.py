"""A stand-in for W&B's server on the loopback, so that tests run the real client against something that remembers.

It answers what wandb and wandb-workspaces ask of the real one for runs, files, artifacts and saved views.
"""

# ruff: noqa: N802, N803, N815
from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

ENTITY = "someone"
USER = {"id": "1", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", "admin": False, "flags": "{}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        server: WandbServer = self.server  # type: ignore[assignment]
        with server.lock:
            status, answer = server.answer(self.command, unquote(self.path), body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_: Any) -> None:
        pass


class WandbServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1 from the start; `stop()` closes the port.

    Attributes:
        runs: what is known of each run, by id: config and summary as sent, history (a dict per step), files, exit code.
        artifacts: type, name, aliases and files of each artifact, in the order of their creation.
        sweep: the last sweep's config.
        views: the saved views (workspaces), by name.
        asked: the GraphQL operations and other paths that were asked for, in order.
        status: what every request is answered with; but 200, nothing is kept.
        refuse_after, refuse_with: from this GraphQL operation or end of a path on, status is this.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.status = 200
        self.refuse_after: str | None = None
        self.refuse_with = 500
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.sweep: dict[str, Any] = {}
        self._uploads: dict[str, dict[str, bytes]] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Clients hang up as they like."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        query = json.loads(body) if path == "/graphql" else {}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1] if query else path
        self.asked.append(operation)
        if operation == self.refuse_after or (self.refuse_after and path.endswith(self.refuse_after)):
            self.status = self.refuse_with
        if self.status != 200:
            return self.status, {"errors": [{"message": f"status {self.status}, as the test asked"}]}
        if query:
            known = getattr(self, f"_{operation}", None)
            if known is None:
                return 200, {"data": None, "errors": [{"message": f"the stand-in does not know {operation}"}]}
            return 200, {"data": known(**(query.get("variables") or {}))}
        if path.endswith("/file_stream"):
            self._file_stream(self.runs[path.split("/")[-2]], json.loads(body))
        elif method == "PUT":
            _, _, owner, name = path.split("/", 3)
            self._uploads[owner][name] = body
        return 200, {}

    def _file_stream(self, run: dict[str, Any], sent: dict[str, Any]) -> None:
        for name, chunk in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                run["history"][chunk["offset"] :] = map(json.loads, chunk["content"])
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
        if sent.get("complete"):
            run["exit_code"] = sent["exitcode"]

    def _upload(self, owner: str, files: dict[str, bytes], name: str) -> str:
        self._uploads[owner] = files
        return f"{self.url}/upload/{owner}/{name}"

    def _node(self, run: dict[str, Any]) -> dict[str, Any]:
        state = "running" if run["exit_code"] is None else "failed" if run["exit_code"] else "finished"
        summary = json.dumps(run["summary"])
        tail = json.dumps([json.dumps(row) for row in run["history"][-1:]])
        return {
            **dict.fromkeys(("displayName", "sweepName", "jobType", "commit", "description", "notes", "eventsTail")),
            **{"id": f"id-{run['id']}", "name": run["id"], "tags": run["tags"], "group": run["group"], "state": state},
            **{"config": json.dumps(run["config"]), "summaryMetrics": summary, "systemMetrics": "{}", "projectId": "1"},
            **{"historyLineCount": len(run["history"]), "logLineCount": 0, "eventsLineCount": 0, "historyTail": tail},
            **{"user": USER, "readOnly": False, "historyKeys": {}, "wandbConfig": '{"t": 1}', "eventsTail": "[]"},
            **{"createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z"},
            "project": {"id": "1", "name": run["project"], "entity": {"id": "1", "name": ENTITY}},
        }

    def _Viewer(self, **_: Any) -> Any:
        return {"viewer": {**USER, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    _GetDefaultEntity = _GetViewer = _Viewer

    def _ServerFeaturesQuery(self) -> Any:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, **_: Any) -> Any:
        return {"entity": {"organization": None}}

    def _RunResumeStatus(self, project: str, name: str, **_: Any) -> Any:
        run = self.runs.get(name)
        owner = {"id": "1", "name": project, "entity": {"id": "1", "name": ENTITY}}
        return {"model": {**owner, "bucket": run and self._node(run)}}

    def _UpsertBucket(self, name: str, project: str, **sent: Any) -> Any:
        new = {"id": name, "project": project, "config": {}, "summary": {}, "history": [], "files": {}, "tags": []}
        inserted = name not in self.runs
        run = self.runs.setdefault(name, {**new, "group": None, "exit_code": None})
        run["config"] = json.loads(sent["config"]) if sent.get("config") else run["config"]
        run.update({key: sent[there] for key, there in (("group", "groupName"), ("tags", "tags")) if sent.get(there)})
        return {"upsertBucket": {"bucket": self._node(run), "inserted": inserted}}

    def _CreateRunFiles(self, run: str, files: list[str], **_: Any) -> Any:
        urls = [{"name": name, "uploadUrl": self._upload(run, self.runs[run]["files"], name)} for name in files]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": urls}}

    def _MarkRunFilesUploaded(self, **_: Any) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _Runs(self, project: str, entity: str, cursor: str | None = None, perPage: int = 50, **_: Any) -> Any:
        found = [run for run in self.runs.values() if run["project"] == project]
        if entity != ENTITY or not found:
            return {"project": None}
        first = int(cursor or 0)
        page = [{"node": self._node(r), "cursor": str(first + i)} for i, r in enumerate(found[first:][:perPage], 1)]
        info = {"endCursor": str(first + perPage), "hasNextPage": first + perPage < len(found)}
        runs = {"edges": page, "pageInfo": info}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": runs}}

    def _UpsertSweep(self, config: str, projectName: str, **_: Any) -> Any:
        self.sweep = yaml.safe_load(config)
        name = {"name": "sweep", "project": {"id": "1", "name": projectName, "entity": {"id": "1", "name": ENTITY}}}
        return {"upsertSweep": {"sweep": name, "configValidationWarnings": []}}

    def _CreateArtifact(self, input: dict[str, Any]) -> Any:
        self.artifacts.append({**input, "files": {}})
        latest = {"artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": {"id": str(len(self.artifacts) - 1), "state": "PENDING", **latest}}}

    def _CreateArtifactFiles(self, input: dict[str, Any]) -> Any:
        nodes = []
        for file in input["artifactFiles"]:
            number, name = file["artifactID"], file["name"]
            url = self._upload(f"artifact-{number}", self.artifacts[int(number)]["files"], name)
            none = {"uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": number}}
            nodes.append({"node": {"storagePath": name, "uploadUrl": url, **none}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CreateArtifactManifest(self, artifactID: str, name: str, **_: Any) -> Any:
        url = self._upload(f"manifest-{artifactID}", {}, name)
        manifest = {"id": "1", "file": {"id": "1", "uploadUrl": url, "uploadHeaders": []}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _UpdateArtifactManifest(self, **sent: Any) -> Any:
        made = self._CreateArtifactManifest("0", "wandb_manifest.json")["createArtifactManifest"]
        return {"updateArtifactManifest": made}

    def _CommitArtifact(self, artifactID: str) -> Any:
        self.artifacts[int(artifactID)]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": ""}}}

    def _View(self, projectName: str, viewName: str, **_: Any) -> Any:
        found = self.views.get(viewName)
        return {"project": {"allViews": {"edges": [{"node": found}] if found else []}}}

    def _UpsertView2(self, name: str, id: str | None = None, **sent: Any) -> Any:
        inserted = id is None
        if inserted and name in self.views:
            raise AssertionError("a view of this name is there already")
        self.views[name] = {"id": id or f"view-{len(self.views)}", "name": name, **sent}
        return {"upsertView": {"view": self.views[name], "inserted": inserted}}
