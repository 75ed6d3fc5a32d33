"""The dashboard of the posterior service."""

from panel import OF_EXPERIMENT, OF_MODEL, Panel, dashboard, gauge, quantiles, rate, recorded, total

__all__ = ["SERVE"]

_UNLIKE = "experiment_model:sbi_serve_out_of_distribution:ratio_rate"

_ROWS = {
    "Requests": [
        Panel(
            "Requests by outcome",
            "How requests ended. Saturated ones were turned away with 503 as too much waited.",
            "reqps",
            ((rate("sbi_serve_requests_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Requests by operation",
            "What was asked for; infer is the Open Inference Protocol.",
            "reqps",
            ((rate("sbi_serve_requests_total", "operation"), "{{operation}}"),),
        ),
        Panel(
            "Failed requests",
            "Share of the requests that failed, timed out or were turned away. The objective "
            "allows 0.1 % of them in 30 days.",
            "percentunit",
            (
                (
                    recorded("experiment:sbi_serve_requests_failed:ratio_rate5m"),
                    "{{experiment}} 5 min",
                ),
                (
                    recorded("experiment:sbi_serve_requests_failed:ratio_rate6h"),
                    "{{experiment}} 6 h",
                ),
            ),
            lines=(0.001,),
        ),
        Panel(
            "Time of a request",
            "From its head to the last byte of the answer, of those that ended ok: quantiles "
            "within the histogram's buckets.",
            "s",
            quantiles("sbi_serve_request_seconds", "operation"),
        ),
        Panel(
            "Slow sample requests",
            "Share of the sample requests that took longer than 0.5 s. The objective allows 1 % "
            "of them in 30 days.",
            "percentunit",
            (
                (
                    recorded("experiment:sbi_serve_sample_slow:ratio_rate5m"),
                    "{{experiment}} 5 min",
                ),
                (
                    recorded("experiment:sbi_serve_sample_slow:ratio_rate6h"),
                    "{{experiment}} 6 h",
                ),
            ),
            lines=(0.01,),
        ),
        Panel(
            "Requests in flight",
            "Requests that a replica is answering.",
            "short",
            ((gauge("sbi_serve_requests_in_flight", "experiment, replica"), "{{replica}}"),),
        ),
    ],
    "Work": [
        Panel(
            "Queue in seconds",
            "Expected time for the draws that admitted requests of a replica wait for. Above 1 s "
            "for ten minutes an alert is raised.",
            "s",
            ((gauge("sbi_serve_queued_seconds", "experiment, replica"), "{{replica}}"),),
            lines=(1.0,),
        ),
        Panel(
            "Queue in draws",
            "Draws that admitted requests of a replica wait for.",
            "short",
            ((gauge("sbi_serve_queued_draws", "experiment, replica"), "{{replica}}"),),
        ),
        Panel(
            "Time in the queue",
            "How long a piece of work waited before it was drawn.",
            "s",
            quantiles("sbi_serve_queue_seconds", "experiment"),
        ),
        Panel(
            "Draws",
            "Posterior draws a second, by model.",
            "short",
            ((rate("sbi_serve_draws_total", "model", OF_MODEL), "{{model}}"),),
        ),
        Panel(
            "Busy replicas",
            "Time that drawing takes, in seconds a second: as many replicas as there are draw all "
            "the time.",
            "short",
            (
                (rate("sbi_serve_busy_seconds_total", "experiment"), "{{experiment}} busy"),
                (
                    f"count by (experiment) (ray_sbi_serve_requests_in_flight{OF_EXPERIMENT})",
                    "{{experiment}} replicas",
                ),
            ),
        ),
        Panel(
            "Draws in a batch",
            "What is drawn in one call. Large batches draw faster, and those behind them wait.",
            "short",
            quantiles("sbi_serve_batch_draws", "model", OF_MODEL),
        ),
        Panel(
            "Pieces in a batch",
            "How many pieces of requests share a call: 1 where nobody waits.",
            "short",
            quantiles("sbi_serve_batch_pieces", "model", OF_MODEL),
        ),
    ],
    "Observations": [
        Panel(
            "Observations by status",
            "What came of the observations that were given; only ok ones have draws.",
            "short",
            ((rate("sbi_serve_observations_total", "status", OF_MODEL), "{{status}}"),),
        ),
        Panel(
            "Unlike the training simulations",
            "Share of the observations with a p-value below 0.01: 1 % of those that are like the "
            "simulations. Posteriors of others are extrapolated. A model that knows no p-value "
            "shows 0.",
            "percentunit",
            (
                (
                    recorded(
                        "experiment_model:sbi_serve_out_of_distribution:ratio_rate1h", OF_MODEL
                    ),
                    "{{model}} 1 h",
                ),
                (
                    recorded(
                        "experiment_model:sbi_serve_out_of_distribution:ratio_rate1d", OF_MODEL
                    ),
                    "{{model}} 1 d",
                ),
            ),
            lines=(0.01, 0.05),
        ),
    ],
    "Models": [
        Panel(
            "Promoted models",
            "How many replicas serve a model as the promoted one. More than one model for long "
            "raises an alert.",
            "short",
            (
                (
                    f"count by (experiment, model) (ray_sbi_serve_model_promoted{OF_MODEL} > 0)",
                    "{{experiment}}: {{model}}",
                ),
            ),
            kind="stat",
        ),
        Panel(
            "Calibration of the promoted models",
            "The verdict of each promoted model's calibration: pass, warn, fail, or none.",
            "short",
            (
                (
                    gauge("sbi_serve_model_calibration", "model, verdict", OF_MODEL) + " > 0",
                    "{{model}}: {{verdict}}",
                ),
            ),
            kind="stat",
        ),
        Panel(
            "Loaded models",
            "How many models a replica holds.",
            "short",
            (
                (
                    f"sum by (experiment, replica) (ray_sbi_serve_model_loaded{OF_MODEL})",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Memory of loaded models",
            "What a replica's models take.",
            "bytes",
            ((gauge("sbi_serve_model_bytes", "experiment, replica"), "{{replica}}"),),
        ),
        Panel(
            "Loads of models",
            "What came of loading models, since the replicas began.",
            "short",
            ((total("sbi_serve_model_loads_total", "outcome"), "{{outcome}}"),),
        ),
    ],
}

SERVE = dashboard(
    "sbi-dist-serve", "sbi_dist: posterior service", "ray_sbi_serve_model_loaded", _ROWS
)
