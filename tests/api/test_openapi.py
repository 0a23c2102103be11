"""The description says what the routes do."""

from __future__ import annotations

import re
import tomllib
from hashlib import sha256
from importlib.resources import files

import jsonschema_rs

from api.errors import ERRORS

OPENAI_IDS = {
    "createFile",
    "listFiles",
    "retrieveFile",
    "downloadFile",
    "deleteFile",
    "createFineTuningJob",
    "listPaginatedFineTuningJobs",
    "retrieveFineTuningJob",
    "cancelFineTuningJob",
    "listFineTuningEvents",
    "listFineTuningJobCheckpoints",
    "listModels",
    "retrieveModel",
    "deleteModel",
}


def operations(client) -> list[dict]:
    schema = client.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    return [operation for path in schema["paths"].values() for operation in path.values()]


def test_operations_are_named_as_openais(client):
    names = [operation["operationId"] for operation in operations(client)]
    assert set(names) >= OPENAI_IDS
    assert len(names) == len(set(names))


def test_every_documented_error_stands_in_the_table(client):
    for operation in operations(client):
        answers = {status: a for status, a in operation["responses"].items() if int(status) >= 400}
        keyed = {"401", "403", "429", "503"} if "security" in operation else set()
        assert keyed | {"400", "500"} <= answers.keys()
        for status, answer in answers.items():
            for code in answer["x-error-codes"]:
                assert ERRORS[code].status == int(status)
                assert code in answer["content"]["application/json"]["examples"]
            schema = answer["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}


def test_every_body_and_every_answer_has_an_example_that_fits(client):
    document = client.get("/openapi.json").json()

    def fits(schema: dict, example: object) -> None:
        whole = schema | {"components": document["components"]}
        jsonschema_rs.validator_for(whole).validate(example)

    for operation in operations(client):
        for kind, media in operation.get("requestBody", {}).get("content", {}).items():
            assert media["examples"], operation["operationId"]
            for example in media["examples"].values():
                if kind == "application/json":
                    fits(media["schema"], example["value"])
        for kind, media in operation["responses"]["200"].get("content", {}).items():
            if kind == "application/json":
                named = media.get("examples", {})
                refs = [example["$ref"].rpartition("/")[2] for example in named.values()]
                shown = [document["components"]["examples"][ref]["value"] for ref in refs]
                shown += [media["example"]] if "example" in media else []
                assert shown, operation["operationId"]
                for example in shown:
                    fits(media["schema"], example)
            elif kind == "text/event-stream":
                assert media["example"].startswith(("id: ", "data: ", "retry: "))


def test_every_parameter_and_operation_says_what_it_is(client):
    document = client.get("/openapi.json").json()
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations(client):
        assert operation["description"]
        assert set(operation["tags"]) <= tags
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], (operation["operationId"], parameter["name"])
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ())


def test_the_reference_shows_every_operation_and_every_link_in_it_leads_somewhere(anonymous):
    page = anonymous.get("/docs")
    assert page.status_code == 200
    names = set(re.findall(r'id="([^"]+)"', page.text))
    assert {operation["operationId"] for operation in operations(anonymous)} <= names
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= names
    assert "sat.omission_rate.mlp" in page.text


def test_the_sat_object_is_described_with_its_ranges(client):
    create = next(o for o in operations(client) if o["operationId"] == "createFineTuningJob")
    sat = create["requestBody"]["content"]["application/json"]["schema"]["properties"]["sat"]
    assert "omission_rate" in sat["properties"]


def test_vendored_files_are_what_their_list_says():
    vendor = files("api.dashboard") / "static" / "vendor"
    listed = tomllib.loads((vendor / "VENDOR.toml").read_text())["file"]
    for item in listed:
        assert sha256((vendor / item["path"]).read_bytes()).hexdigest() == item["sha256"]
        assert (vendor / item["licence_file"]).read_text()
    named = {item[key] for item in listed for key in ("path", "licence_file")} | {"VENDOR.toml"}
    assert {entry.name for entry in vendor.iterdir()} == named


def test_the_command_that_the_empty_page_shows_is_one_that_exists(client):
    from typer.testing import CliRunner

    from cli.main import app as command

    from .conftest import KEY

    page = client.get(f"/login?key={KEY}").text
    shown = next(line for line in page.splitlines() if "satune submit" in line)
    known = CliRunner(env={"COLUMNS": "200"}).invoke(command, ["submit", "--help"]).output
    for word in shown.split("<code>")[1].split("</code>")[0].split():
        assert not word.startswith("--") or word in known
