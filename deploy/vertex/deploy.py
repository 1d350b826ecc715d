"""Uploads the image and a model's files to Vertex AI as a model, and deploys it to an endpoint.

    pip install google-cloud-aiplatform
    python deploy/vertex/deploy.py --project P --region us-central1 \
        --image us-central1-docker.pkg.dev/P/gemma/gemma-server:0.1.0-cuda \
        --artifact-uri gs://BUCKET/gemma-2b-it --name gemma-2b-it

It waits until the endpoint answers, and prints what to ask it with.
"""

from __future__ import annotations

import argparse
from typing import Any

from google.cloud import aiplatform

PORT = 8080
HEALTH_ROUTE = "/readyz"
PREDICT_ROUTE = "/predict"
PROBES = {"startup": "startup", "health": "ready"}
"""Vertex AI's probes, and what `server.probe` calls the question."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--project", required=True)
    parser.add_argument("--region", required=True)
    parser.add_argument("--image", required=True, help="the server's image in Artifact Registry")
    parser.add_argument("--artifact-uri", help="gs:// directory of the model; or name it with --model")
    parser.add_argument("--model", help="a Hugging Face model id, instead; set HF_TOKEN with --env")
    parser.add_argument("--name", required=True, help="of model and endpoint, for people")
    parser.add_argument("--machine-type", default="g2-standard-8")
    parser.add_argument("--accelerator-type", default="NVIDIA_L4", help="empty for none")
    parser.add_argument("--accelerator-count", type=int, default=1)
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=1)
    parser.add_argument(
        "--target-waiting", type=int, help="requests that may wait in each replica before another is added"
    )
    parser.add_argument("--service-account", help="which may read the bucket")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of the server")
    parser.add_argument(
        "--shared-endpoint",
        action="store_true",
        help="60 seconds and 1.5 MB for each answer, instead of a dedicated endpoint's hour",
    )
    parser.add_argument("--request-timeout", type=int, default=3600, help="seconds, of a dedicated endpoint")
    parser.add_argument("--start-timeout", type=int, default=1800, help="seconds until a replica must be ready")
    parser.add_argument(
        "--invoke",
        action="store_true",
        help="every path of the server under the endpoint's /invoke, instead of one route for predictions",
    )
    parser.add_argument(
        "--shared-memory-mb", type=_positive, metavar="N", help="of the machine's memory, for /dev/shm"
    )
    for probe, question in PROBES.items():
        command = f"python -m server.probe {question}"
        parser.add_argument(
            f"--{probe}-probe-period",
            type=_positive,
            metavar="SECONDS",
            help=f"from one `{command}` in the container to the next; not run unless this is given",
        )
        parser.add_argument(
            f"--{probe}-probe-timeout",
            type=_positive,
            metavar="SECONDS",
            help="until it counts as failed. Default: as long as the period",
        )
    given = parser.parse_args(arguments)
    if (given.artifact_uri is None) == (given.model is None):
        parser.error("give one of --artifact-uri and --model")
    if any("=" not in pair for pair in given.env):
        parser.error("--env takes NAME=VALUE")
    if given.invoke and given.shared_endpoint:
        parser.error("--invoke needs a dedicated endpoint: leave out --shared-endpoint")
    for probe in PROBES:
        if getattr(given, f"{probe}_probe_timeout") and not getattr(given, f"{probe}_probe_period"):
            parser.error(f"--{probe}-probe-timeout needs --{probe}-probe-period")
    return given


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def deploy(given: argparse.Namespace) -> Any:
    """The endpoint, once it serves."""
    aiplatform.init(project=given.project, location=given.region)
    variables = dict(pair.split("=", 1) for pair in given.env)
    if given.model is not None:
        variables["MODEL_ID"] = given.model
    model = aiplatform.Model.upload(
        display_name=given.name,
        artifact_uri=given.artifact_uri,
        serving_container_image_uri=given.image,
        serving_container_ports=[PORT],
        serving_container_health_route=HEALTH_ROUTE,
        serving_container_environment_variables=variables,
        serving_container_deployment_timeout=given.start_timeout,
        serving_container_shared_memory_size_mb=given.shared_memory_mb,
        **_routes(given),
        **_probes(given),
    )
    dedicated = {} if given.shared_endpoint else {"inference_timeout": given.request_timeout}
    endpoint = aiplatform.Endpoint.create(
        display_name=given.name, dedicated_endpoint_enabled=not given.shared_endpoint, **dedicated
    )
    model.deploy(
        endpoint=endpoint,
        traffic_percentage=100,
        machine_type=given.machine_type,
        accelerator_type=given.accelerator_type or None,
        accelerator_count=given.accelerator_count if given.accelerator_type else None,
        min_replica_count=given.min_replicas,
        max_replica_count=given.max_replicas,
        autoscaling_target_vllm_num_requests_waiting=given.target_waiting,
        service_account=given.service_account,
    )
    return endpoint


def _routes(given: argparse.Namespace) -> dict[str, str]:
    """A model has one or the other; what there is for `invoke` is all paths."""
    if given.invoke:
        return {"serving_container_invoke_route_prefix": "/*"}
    return {"serving_container_predict_route": PREDICT_ROUTE}


def _probes(given: argparse.Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for probe, question in PROBES.items():
        period = getattr(given, f"{probe}_probe_period")
        if period is not None:
            prefix = f"serving_container_{probe}_probe"
            arguments[f"{prefix}_exec"] = ["python", "-m", "server.probe", question]
            arguments[f"{prefix}_period_seconds"] = period
            arguments[f"{prefix}_timeout_seconds"] = getattr(given, f"{probe}_probe_timeout") or period
    return arguments


def main() -> None:
    given = parse_arguments()
    endpoint = deploy(given)
    print(f"serving at {endpoint.resource_name}")
    invoke = " --invoke" if given.invoke else ""
    print(f"python deploy/vertex/smoke.py --endpoint {endpoint.resource_name}{invoke}")


if __name__ == "__main__":
    main()
