"""Files of Ray's cluster launcher: what AWS and Google Cloud are asked for, and what a job's demand would start.

No cloud is reached: moto answers as AWS does, and a recorder stands where Google's API would.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check.__main__ import check_file
from cluster.check.launcher import launcher_problems
from cluster.check.versions import pinned
from tests.cluster_files.commands import ray_options, shell_problems

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "cluster" / "launcher"
FILES = sorted(LAUNCHER.glob("*.yaml"))
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
START = ("head_start_ray_commands", "worker_start_ray_commands")


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((LAUNCHER / name).read_text(encoding="utf-8"))
    return document


def start_options(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What Ray's own parser makes of the `ray start` in a list of commands."""
    (command,) = (command for command in document[key] if "ray start" in command)
    return ray_options("start", command.partition("ray start")[2])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_wrong_with_a_file(path: Path) -> None:
    """Ray's validation, defaults that surprise, versions: what `make cluster-check` looks at."""
    assert check_file(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_starts_with_a_token_and_is_seen_by_its_own_machine_only(path: Path) -> None:
    document = load(path.name)
    head, worker = (start_options(document, key) for key in START)
    assert head["head"] and head["dashboard_host"] == "127.0.0.1" and head["autoscaling_config"]
    assert worker["address"] and not worker["head"]
    for options in (head, worker):
        assert options["object_spilling_directory"] and not options["ray_debugger_external"]
    for key in START:
        assert "RAY_AUTH_MODE=token" in document[key][-1]
    mounts = document["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token", "the token is no part of the file"
    own = [source for target, source in mounts.items() if target.startswith("~/diffsynth/")]
    assert "constraints.txt" in own and all((ROOT / source).exists() for source in own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_are_shell_and_name_only_pinned_versions(path: Path) -> None:
    document = load(path.name)
    commands = [command for key in (*COMMANDS, *START) for command in document[key]]
    for command in commands:
        assert shell_problems(command, "--exclude=SC1090") == "", command  # what ~/venv has is not here
    for command in commands:
        for word in shlex.split(command, comments=True):
            package, given, version = word.partition("==")
            assert not given or pinned()[package] == version, word
    assert any("pip install --quiet -c constraints.txt '.[" in command for command in document["setup_commands"])


@pytest.mark.parametrize(
    ("name", "keys", "value", "problem"),
    [
        ("gcp.yaml", ("provider", "availability_zone"), "us-east4-a", "is in the zone us-central1-a"),
        ("gcp.yaml", ("available_node_types", "encode", "resources"), {}, "no job's demand starts this group"),
        ("aws.yaml", ("available_node_types", "train", "node_config"), {"InstanceType": "p5.48xlarge"}, "Ubuntu 18.04"),
        ("aws.yaml", ("file_mounts",), {}, "have no token"),
        ("onprem.yaml", ("head_start_ray_commands",), None, "opens the dashboard to 0.0.0.0"),
    ],
)
def test_what_ray_would_accept_is_found(name: str, keys: tuple[str, ...], value: object, problem: str) -> None:
    document = load(name)
    inner: Any = document
    for key in keys[:-1]:
        inner = inner[key]
    old = inner[keys[-1]]
    inner[keys[-1]] = [line.replace("127.0.0.1", "0.0.0.0") for line in old] if value is None else value
    found = list(map(str, launcher_problems(document)))
    assert found and all(problem in line for line in found), found


def test_the_groups_are_the_same_in_both_clouds() -> None:
    for name in ("aws.yaml", "gcp.yaml"):
        document = load(name)
        types = document["available_node_types"]
        assert types["head"]["resources"] == {"CPU": 0}, "what the head has is used beside the driver"
        assert {kind: types[kind]["labels"] for kind in ("encode", "train")} == {
            "encode": {"stage": "encode"},
            "train": {"stage": "train"},
        }
        assert [types[kind]["min_workers"] for kind in types] == [0, 0, 0]
        assert document["max_workers"] >= sum(types[kind]["max_workers"] for kind in types)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The configuration that Ray makes of the file in an AWS that moto plays, with the instance profile."""
    from moto import mock_aws

    home = tmp_path_factory.mktemp("home")  # Ray puts the key pair that it makes into ~/.ssh
    with pytest.MonkeyPatch.context() as patched, mock_aws():
        patched.setenv("HOME", str(home))
        patched.setenv("AWS_ACCESS_KEY_ID", "testing")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        import boto3
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.util import prepare_config

        boto3.client("iam", "us-east-1").create_instance_profile(InstanceProfileName="diffsynth")
        document = load("aws.yaml")
        document["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]["Arn"] = (
            "arn:aws:iam::123456789012:instance-profile/diffsynth"
        )
        yield bootstrap_aws(prepare_config(document))


@pytest.mark.slow
def test_the_resources_of_the_groups_are_those_of_the_instance_types(aws: dict[str, Any]) -> None:
    """Where Ray's provider can detect them, they equal what the file says."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    written = {name: dict(load("aws.yaml")["available_node_types"][name]["resources"]) for name in ("encode", "train")}
    bare = load("aws.yaml")
    for kind in bare["available_node_types"].values():
        del kind["resources"]
    detected = AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
    for name, resources in written.items():
        assert resources == {key: detected[name]["resources"][key] for key in ("CPU", "GPU")}, name
    assert "accelerator_type:L4" in detected["encode"]["resources"]
    assert "accelerator_type:A100" in detected["train"]["resources"]


@pytest.mark.slow
def test_aws_starts_what_the_file_asks_for(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    started = {}
    for name, kind in aws["available_node_types"].items():
        tags = {"ray-user-node-type": name, "ray-node-kind": "head" if name == "head" else "worker"}
        ((_, instance),) = provider.create_node(kind["node_config"], {**tags, "ray-launch-config": "x"}, 1).items()
        started[name] = instance
    types = {name: (instance.instance_type, instance.instance_lifecycle) for name, instance in started.items()}
    assert types == {
        "head": ("m7i.2xlarge", None),
        "encode": ("g6.2xlarge", "spot"),
        "train": ("p4d.24xlarge", None),
    }
    for instance in started.values():
        assert instance.iam_instance_profile["Arn"].endswith("instance-profile/diffsynth")
        assert instance.image_id == load("aws.yaml")["available_node_types"]["head"]["node_config"]["ImageId"]
    (group,) = {group["GroupId"] for instance in started.values() for group in instance.security_groups}
    import boto3

    rules = boto3.resource("ec2", "us-east-1").SecurityGroup(group).ip_permissions
    public = [rule for rule in rules if any(span["CidrIp"] == "0.0.0.0/0" for span in rule["IpRanges"])]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in public] == [(22, 22)], "reached from outside: SSH alone"


@cache
def google() -> dict[str, Any]:
    """Google's own description of the API `compute.v1`, as its client library has it."""
    import googleapiclient.discovery_cache

    folder = Path(googleapiclient.discovery_cache.__file__).parent / "documents"
    document: dict[str, Any] = json.loads((folder / "compute.v1.json").read_text(encoding="utf-8"))
    return document


def google_problems(value: Any, schema: Mapping[str, Any], place: str) -> list[str]:
    """Fields that the description does not have, values of another type, words that an enum does not list."""
    if "$ref" in schema:
        return google_problems(value, google()["schemas"][schema["$ref"]], place)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{place}: {value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value!r} is none of {schema['enum']}"]
    found: list[str] = []
    for key, inner in value.items() if isinstance(value, dict) else ():
        known = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
        found += google_problems(inner, known, f"{place}.{key}") if known else [f"{place}.{key}: no such field"]
    for at, inner in enumerate(value) if isinstance(value, list) else ():
        found += google_problems(inner, schema["items"], f"{place}[{at}]")
    return found


class Recorder:
    """Stands where Google's API would be: remembers what is asked, and answers with an operation."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.credentials = None

    def request(self, uri: str, method: str = "GET", body: str = "", **_: object) -> tuple[Any, bytes]:
        import httplib2

        self.requests.append((method, uri, json.loads(body)))
        return httplib2.Response({"status": 200}), b'{"name": "operation"}'


def test_google_is_asked_for_what_its_description_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from googleapiclient.discovery import build_from_document
    from ray.autoscaler._private.gcp.node import GCPCompute

    recorder = Recorder()
    monkeypatch.setattr(GCPCompute, "get_new_authorized_http", lambda self, http: recorder)
    document = load("gcp.yaml")
    provider = document["provider"]
    client = build_from_document(google(), http=recorder)
    compute = GCPCompute(client, provider["project_id"], provider["availability_zone"], document["cluster_name"])
    asked = {}
    for name, kind in document["available_node_types"].items():
        labels = {"ray-node-name": f"ray-{document['cluster_name']}-worker", "ray-user-node-type": name}
        compute.create_instance(kind["node_config"], labels, wait_for_operation=False)
        method, uri, body = recorder.requests.pop()
        assert method == "POST" and "/projects/my-project/zones/us-central1-a/instances?" in uri
        assert google_problems(body, {"$ref": "Instance"}, name) == []
        asked[name] = body
    assert asked["encode"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in asked["train"]["scheduling"]
    assert all(asked[name]["scheduling"]["onHostMaintenance"] == "TERMINATE" for name in ("encode", "train"))
    # Machines of these series bring their GPUs: series-kind-vCPUs, and series-kind-NUMBERg for A2.
    resources = {name: document["available_node_types"][name]["resources"] for name in ("encode", "train")}
    assert resources["encode"]["CPU"] == int(asked["encode"]["machineType"].rsplit("-", 1)[1])
    assert resources["train"]["GPU"] == int(asked["train"]["machineType"].rsplit("-", 1)[1].rstrip("g"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"machinType": "n2-standard-8"}, "encode.machinType: no such field"),
        ({"scheduling": [{"preemptible": True}]}, "encode.scheduling: [{'preemptible': True}] is no object"),
        ({"scheduling": {"provisioningModel": "spot"}}, "encode.scheduling.provisioningModel: 'spot' is none of"),
        ({"disks": [{"initializeParams": {"diskSizeGb": 200}}]}, "diskSizeGb: 200 is no string"),
    ],
)
def test_what_google_would_refuse_is_found(change: dict[str, Any], problem: str) -> None:
    config = {**load("gcp.yaml")["available_node_types"]["encode"]["node_config"], **change}
    (found,) = google_problems(config, {"$ref": "Instance"}, "encode")
    assert problem in found


def test_on_premise_machines_find_their_labels_in_a_file_of_their_own(tmp_path: Path) -> None:
    from ray._private.label_utils import parse_node_labels_from_yaml_file
    from ray.autoscaler._private.util import prepare_config

    document = load("onprem.yaml")
    assert start_options(document, "worker_start_ray_commands")["labels_file"].endswith("/ray_labels.yaml")
    (setup,) = (command for command in document["setup_commands"] if "ray_labels.yaml" in command)
    for _ in range(2):  # a machine that is for nothing in particular has a file too, which setting up again keeps
        subprocess.run(["bash", "-ec", setup], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
        assert parse_node_labels_from_yaml_file(str(tmp_path / "ray_labels.yaml")) == {}
    (tmp_path / "ray_labels.yaml").write_text("stage: encode\n")
    subprocess.run(["bash", "-ec", setup], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert parse_node_labels_from_yaml_file(str(tmp_path / "ray_labels.yaml")) == {"stage": "encode"}
    (kind,) = prepare_config(document)["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(document["provider"]["worker_ips"])


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    ("stage", "bundles", "started"),
    [
        ("encode", [{"CPU": 1, "GPU": 1}] * 4, {"encode": 4}),
        ("encode", [{"CPU": 1, "GPU": 1}] * 17, {}),  # more than the group may have: no other one in its place
        ("encode", [{"CPU": 0.5}], {"encode": 1}),
        ("train", [{"CPU": 1, "GPU": 1}] * 8, {"train": 1}),
        ("train", [{"CPU": 1, "GPU": 1}] * 12, {"train": 2}),
    ],
)
def test_a_demand_with_labels_starts_its_own_group_only(
    name: str, stage: str, bundles: list[dict[str, float]], started: dict[str, int]
) -> None:
    """Ray's own scheduler of autoscaler v2, which `ray up` turns on."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    config = AutoscalingConfig(load(name), skip_content_hash=True)
    selector = [[("stage", LabelSelectorOperator.LABEL_OPERATOR_IN, [stage])]]
    requests = [ResourceRequestUtil.make(bundle, label_selectors=selector) for bundle in bundles]
    constraint = ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count(requests))
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            cluster_resource_constraints=[constraint],
            disable_launch_config_check=True,
        )
    )
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == started
