"""Typical mistakes in a file of Ray's cluster launcher."""

from __future__ import annotations

from tests.cluster_files.mistakes import AWS, GONE, Mistake, Renamed

MISTAKES = {
    "a misspelled key of the launcher": Mistake(
        AWS, {"upscaling_speed": Renamed("upscaling_sped")}, "", "'upscaling_sped' was unexpected"
    ),
    "a head that is no type of node": Mistake(AWS, {"head_node_type": "heads"}, "", "head_node_type"),
    "a group whose size is left to Ray": Mistake(
        AWS,
        {"available_node_types.train.max_workers": GONE},
        "available_node_types.train.max_workers",
        "Ray then takes 2; say how many",
    ),
    "a cluster whose size is left to Ray": Mistake(AWS, {"max_workers": GONE}, "max_workers", "takes 2.*say how many"),
    "the provider's own installation": Mistake(AWS, {"setup_commands": []}, "setup_commands", "nightly Ray; install"),
    "a worker without a token": Mistake(
        AWS,
        {"worker_start_ray_commands": lambda lines: [line.replace("RAY_AUTH_MODE=token", "A=b") for line in lines]},
        "worker_start_ray_commands[1]",
        "without a token.*export RAY_AUTH_MODE=token",
    ),
    "a misspelled option of ray start": Mistake(
        AWS,
        {
            "head_start_ray_commands": lambda lines: [
                line.replace("--autoscaling-config", "--autoscale") for line in lines
            ]
        },
        "head_start_ray_commands[1]",
        "ray start: No such option.*--autoscale",
    ),
}
