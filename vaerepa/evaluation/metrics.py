"""Metrics, computed from the features of generated and of real images; all but the Fréchet distances by torch-fidelity."""

from vaerepa.evaluation.features import Measured
from vaerepa.evaluation.statistics import frechet_distance

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "kid_std": "KID, deviation",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "inception_score_std": "Inception Score, deviation",
}
MIN_SAMPLES = 10  # the Inception Score is the mean over ten splits
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
SPLITS = 10
SEED = 2020  # torch-fidelity's


def compute_metrics(samples: Measured, reference: Measured) -> dict[str, float]:
    """Computes the metrics that samples and reference allow.

    FID (arXiv 1706.08500) and sFID (arXiv 2103.03841, on the features of ADM's evaluator); KID (arXiv 1801.01401), the mean
    over 100 subsets of 1000 images, or of all images where there are fewer; precision and recall (arXiv 1904.06991) with 3
    neighbours; Inception Score (arXiv 1606.03498) over 10 splits.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    values: dict[str, float] = {}
    for name, metric in (("pool", "fid"), ("spatial", "sfid")):
        if name in samples.statistics and name in reference.statistics:
            values[metric] = frechet_distance(samples.statistics[name], reference.statistics[name])
    if "pool" in reference.features:
        both = samples.features["pool"], reference.features["pool"]
        size = min(KID_SUBSET_SIZE, *map(len, both))
        kid = kid_features_to_metric(*both, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False)
        values["kid"] = kid["kernel_inception_distance_mean"]
        values["kid_std"] = kid["kernel_inception_distance_std"]
        found = prc_features_to_metric(*both, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
        values |= {name: found[name] for name in ("precision", "recall")}
    if "logits" in samples.features:
        score = isc_features_to_metric(samples.features["logits"], SPLITS, rng_seed=SEED)
        values["inception_score"] = score["inception_score_mean"]
        values["inception_score_std"] = score["inception_score_std"]
    return values


def left_out(samples: Measured, reference: Measured) -> dict[str, str]:
    """Metrics that cannot be computed, each with the reason."""
    reasons = {}
    for name, metric in (("pool", "fid"), ("spatial", "sfid")):
        if name not in reference.statistics:
            reasons[metric] = "the reference has no such statistics"
    if "pool" not in reference.features:
        reasons |= dict.fromkeys(
            ("kid", "precision", "recall"), "the reference holds no images, and no features of them"
        )
    if "logits" not in samples.features:
        reasons["inception_score"] = "the Inception weights have no classifier layer"
    return reasons
