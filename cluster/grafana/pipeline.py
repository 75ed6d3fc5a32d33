"""The dashboard of the stages that end: simulate, train and infer."""

from panel import OF_MODEL, Panel, dashboard, gauge, rate, total

__all__ = ["PIPELINE"]

_ROWS = {
    "Simulate": [
        Panel(
            "Simulations by status",
            "Simulations a second whose shards were stored. All but ok gave no data.",
            "short",
            ((rate("sbi_simulate_simulations_total", "status"), "{{status}}"),),
        ),
        Panel(
            "Rate of simulating",
            "Simulations a second since the run began.",
            "short",
            (
                (
                    gauge("sbi_simulate_simulations_per_second", "experiment, dataset"),
                    "{{experiment}} {{dataset}}",
                ),
            ),
        ),
        Panel(
            "Time left to simulate",
            "At the rate of the run so far.",
            "s",
            (
                (
                    gauge("sbi_simulate_seconds_left", "experiment, dataset"),
                    "{{experiment}} {{dataset}}",
                ),
            ),
        ),
        Panel(
            "Actors that simulate",
            "How many there are, and how many are busy with simulations that were stored.",
            "short",
            (
                (gauge("sbi_simulate_actors", "experiment, dataset"), "{{experiment}} actors"),
                (
                    rate("sbi_simulate_busy_seconds_total", "experiment, dataset"),
                    "{{experiment}} busy",
                ),
            ),
        ),
        Panel(
            "Shards",
            "Shards a second that were stored.",
            "short",
            ((rate("sbi_simulate_shards_total", "experiment, dataset"), "{{experiment}}"),),
        ),
        Panel(
            "Deaths of actors",
            "Actors that were lost since the run began, to crashes, lack of memory or lost nodes.",
            "short",
            (
                (
                    total("sbi_simulate_actor_deaths_total", "experiment, dataset"),
                    "{{experiment}} simulate",
                ),
                (
                    total("sbi_infer_actor_deaths_total", "experiment, catalog"),
                    "{{experiment}} infer {{catalog}}",
                ),
            ),
        ),
    ],
    "Train": [
        Panel(
            "Loss",
            "In nats. A validation loss that rises while the training loss falls is overfitting.",
            "short",
            (
                (gauge("sbi_train_loss", "model", OF_MODEL), "{{model}} training"),
                (gauge("sbi_train_validation_loss", "model", OF_MODEL), "{{model}} validation"),
                (gauge("sbi_train_best_validation_loss", "model", OF_MODEL), "{{model}} best"),
            ),
        ),
        Panel(
            "Learning rate",
            "Of the last step.",
            "short",
            ((gauge("sbi_train_learning_rate", "model", OF_MODEL), "{{model}}"),),
        ),
        Panel(
            "Epoch",
            "From 1.",
            "short",
            ((gauge("sbi_train_epoch", "model", OF_MODEL), "{{model}}"),),
        ),
        Panel(
            "Simulations trained on",
            "By all workers together, a second: as the training tells it, and as it was counted.",
            "short",
            (
                (gauge("sbi_train_simulations_per_second", "model", OF_MODEL), "{{model}} told"),
                (rate("sbi_train_simulations_total", "model", OF_MODEL), "{{model}} counted"),
            ),
        ),
        Panel(
            "Waiting for simulations",
            "Share of its time that a worker waits to read. Above 30 % the store or the network "
            "holds the training up.",
            "percentunit",
            (
                (
                    rate("sbi_train_input_wait_seconds_total", "model, rank", OF_MODEL),
                    "{{model}} worker {{rank}}",
                ),
            ),
            lines=(0.3,),
        ),
        Panel(
            "Time left to train",
            "At most: training may stop early.",
            "s",
            ((gauge("sbi_train_seconds_left", "model", OF_MODEL), "{{model}}"),),
        ),
        Panel(
            "Events of the training",
            "Steps that were skipped as they were not finite, restarts after lost workers, and "
            "checkpoints.",
            "short",
            (
                (
                    total("sbi_train_skipped_steps_total", "model", OF_MODEL),
                    "{{model}} skipped steps",
                ),
                (total("sbi_train_restarts_total", "model", OF_MODEL), "{{model}} restarts"),
                (total("sbi_train_checkpoints_total", "model", OF_MODEL), "{{model}} checkpoints"),
            ),
        ),
    ],
    "Infer": [
        Panel(
            "Observations by status",
            "Observations a second whose results were stored. Only ok and low_ess have draws.",
            "short",
            ((rate("sbi_infer_observations_total", "catalog, status"), "{{catalog}} {{status}}"),),
        ),
        Panel(
            "Draws and parts",
            "What was stored, a second.",
            "short",
            (
                (rate("sbi_infer_draws_total", "catalog"), "{{catalog}} draws"),
                (rate("sbi_infer_parts_total", "catalog"), "{{catalog}} parts"),
            ),
        ),
        Panel(
            "Rate of inference",
            "Observations a second since the run began.",
            "short",
            ((gauge("sbi_infer_observations_per_second", "catalog"), "{{catalog}}"),),
        ),
        Panel(
            "Time left to infer",
            "At the rate of the run so far.",
            "s",
            ((gauge("sbi_infer_seconds_left", "catalog"), "{{catalog}}"),),
        ),
    ],
    "Nodes": [
        Panel(
            "CPU",
            "As Ray measures it on each node.",
            "percent",
            (("max by (instance) (ray_node_cpu_utilization)", "{{instance}}"),),
        ),
        Panel(
            "Memory",
            "Share of a node's memory in use. Near 95 % Ray ends workers.",
            "percentunit",
            (
                (
                    "max by (instance) (ray_node_mem_used) / max by (instance) "
                    "(ray_node_mem_total)",
                    "{{instance}}",
                ),
            ),
            lines=(0.95,),
        ),
        Panel(
            "GPU",
            "Use of each GPU; without one there is nothing here.",
            "percent",
            (
                (
                    "max by (instance, GpuIndex) (ray_node_gpus_utilization)",
                    "{{instance}} {{GpuIndex}}",
                ),
            ),
        ),
    ],
}

PIPELINE = dashboard(
    "sbi-dist-pipeline", "sbi_dist: simulate, train, infer", "ray_sbi_train_epoch", _ROWS
)
