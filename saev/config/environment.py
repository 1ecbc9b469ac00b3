"""Which environment steps get from the cluster's Secret and ConfigMap, and where.

On a cluster the two are mounted as folders with one file per key, and the supervisor of a step
(`saev.steps.environment`) makes them its environment. As variables of the pod they would be most of
what Kubernetes stores of a run: it repeats them six times for each pod.
"""

SECRET_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CONFIG_ENV = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "SAEV_LOG_LEVEL",
    "SAEV_CACHE_DIR", "SAEV_CACHE_GB", "SAEV_DIRECT_IO", "SAEV_PATIENCE_S",
)  # fmt: skip
"""Keys of the secret and of the config map that become environment of the steps. All may be
missing: on AWS, the service account's role brings credentials of its own."""

SECRET_MOUNT = "/saev/secret"
CONFIG_MOUNT = "/saev/config"
"""Where the two are mounted."""
