"""The faults of docs/faults.md: how each is provoked, what is expected, and which test or loop shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of docs/faults.md."""

    fault: str
    how: str
    expected: str
    tests: tuple[str, ...] = ()
    """Tests that provoke it, as pytest names them, without parameters."""
    loop: str | None = None
    """The kill loop that provokes it: a way of continuing."""


DATA, SHARDS = "tests/data/test_loader.py::test_", "tests/data/test_shards.py::test_"
DECODE, ORDER = "tests/data/test_decode.py::test_", "tests/data/test_position.py::test_"
NODES, PROCESSES = "tests/faults/test_two_nodes.py::test_", "tests/faults/test_processes.py::test_"
STORE, RESUME = "tests/checkpoint/test_store.py::test_", "tests/checkpoint/test_resume.py::test_"
ENGINE, LAUNCH = "tests/parallel/test_engines.py::test_", "tests/multiprocess/test_engines_train_alike.py::test_"
LOOP = "tests/train/test_loop.py::test_"

FAULTS = "tests/multiprocess/test_faults.py::test_"
PODS, SUPERVISE = "tests/cluster/test_pods.py::test_", "tests/cluster/test_supervise.py::test_"
STOP = "tests/train/test_stopping.py::test_"
RANKS_TESTS = "tests/checkpoint/test_ranks.py::test_"
ROWS = (
    Row("a rank, the launcher or all die", "kill -9 at random moments, then --resume",
        "everything leaves within 10 s; the same end, bit for bit", loop="resume"),
    Row("a rank dies under torchrun --max-restarts", "kill -9 at random moments",
        "torchrun starts the ranks again in place; the same end, bit for bit", loop="restart"),
    Row("the launcher alone dies", "kill -9", "its ranks leave too",
        (PROCESSES + "ranks_leave_when_their_launcher_dies",)),
    Row("a rank dies in a step", "kill -9 by a fail point", "the other ranks leave at once, or by the time-out",
        (FAULTS + "a_killed_rank_takes_the_other_with_it",)),
    Row("a rank hangs", "a fail point that never returns; a phase longer than its limit",
        "the stacks of all threads are written, exit code 74",
        (FAULTS + "a_hanging_rank_is_ended_and_its_stacks_are_kept",
         "tests/parallel/test_watchdog.py::test_a_hang_is_ended_with_the_stacks_of_all_threads")),
    Row("SIGTERM or SIGUSR1 to one rank, to torchrun", "real signals",
        "one checkpoint, all ranks at the same step, exit code 75; resumed exactly",
        (FAULTS + "a_signal_to_one_rank_stops_both_at_the_same_step",
         STOP + "a_run_asked_to_stop_saves_leaves_and_continues_exactly",
         FAULTS + "torchrun_passes_a_signal_on_and_a_second_job_is_refused")),
    Row("a rank is suspended", "SIGSTOP by a fail point", "its peers leave with 74 at the limit of the step",
        (FAULTS + "nobody_waits_for_a_suspended_rank",)),
    Row("a worker that reads data is killed", "kill -9", "the run ends with an error, not with a hang",
        (FAULTS + "a_killed_data_worker_ends_the_run",)),
    Row("SIGTERM to the first process of a container", "a namespace of processes", "as any other process",
        (FAULTS + "process_number_one_of_a_container_heeds_a_signal",)),
    Row("SIGTERM to deepspeed's launch.py", "a real signal, which it passes on to one rank after the other",
        "all ranks save and leave at the same step", (FAULTS + "the_deepspeed_launcher_process_passes_a_signal_on",)),
    Row("SIGTERM to the deepspeed runner", "a real signal",
        "its ranks train on (DeepSpeed does not tell them); `dydit stop` ends them",
        (FAULTS + "the_deepspeed_runner_keeps_a_signal_to_itself_and_the_stop_file_helps",)),
    Row("SIGTERM to the supervisor of torchrun or of the deepspeed runner", "real signals",
        "all ranks save and leave at the same step; the supervisor leaves with 75",
        (PODS + "a_signal_to_the_supervisor_ends_its_ranks_with_their_state_saved",
         SUPERVISE + "the_answer_is_that_of_the_ranks")),
    Row("two pods are stopped by their preStop hook", "the words and variables of a rendered Job, in two networks",
        "both leave with 75; one pod goes on at the same step",
        (PODS + "pods_train_stop_before_they_are_ended_and_go_on_as_one",)),
    Row("Slurm's time limit, failures and mistakes", "the rendered batch script, with stand-ins for srun and scontrol",
        "back into the queue, or not, after each exit code",
        (SUPERVISE + "a_batch_script_goes_back_into_the_queue_when_that_helps",)),
    Row("a mistake in the recipe, under a launcher that answers 1", "an unknown key, under torchrun",
        "the supervisor leaves with 64", (PODS + "a_mistake_in_the_recipe_is_told_through_torchrun",)),
    Row("a rank that is slow now and then", "SIGSTOP and SIGCONT by turns", "the same losses, nothing fails",
        (FAULTS + "a_rank_that_is_slow_now_and_then_fails_nothing",)),
    Row("a signal during set-up, twice, between micro-batches", "fail points",
        "no checkpoint of a step half done, no damage", (FAULTS + "a_signal_to_one_rank_during_set_up_stops_both",
         STOP + "a_second_signal_during_the_save_changes_nothing",
         STOP + "a_stop_between_micro_batches_leaves_the_step_undone")),
    Row("two jobs on one run folder", "a second start; a stolen token",
        "the second is refused while the first lives; whoever lost the folder commits nothing",
        (STOP + "a_second_start_in_the_folder_of_a_living_run_is_refused",
         STOP + "a_run_that_lost_its_folder_commits_nothing",
         RANKS_TESTS + "a_process_that_lost_the_run_changes_nothing_and_ends")),
    Row("ranks that disagree on the recipe", "another learning rate on one rank",
        "refused before the first step, with what differs",
        (FAULTS + "ranks_that_disagree_are_refused_with_what_differs",)),
    Row("the network between two nodes is cut", "network namespaces, the cable taken down in the middle of a step",
        "both sides leave by the time-out, nothing is committed; after the repair the same end, bit for bit",
        (NODES + "a_cut_cable_then_a_lost_node_cost_no_step",)),
    Row("rank 0's node is lost", "kill -9 to all that runs in its namespace",
        "the other node leaves; resumed from the last commit, the same end, bit for bit",
        (NODES + "a_cut_cable_then_a_lost_node_cost_no_step",)),
    Row("a node is lost while DeepSpeed talks in a group of its own", "the time-outs of all groups of a run",
        "all are the run's", (NODES + "no_group_of_deepspeed_waits_longer_for_a_lost_node_than_the_run",)),
    Row("another engine or number of ranks after a stop", "all pairs of single, ZeRO-1, 2, 3 and FSDP2; 1 and 2 ranks",
        "the same losses and final state",
        (RESUME + "resume_equals_the_uninterrupted_run", LAUNCH + "one_engine_continues_anothers_run")),
    Row("twice as many ranks and another engine after a stop", "ZeRO-3 on two ranks, then FSDP2 on four",
        "the same losses and final state", ("tests/multiprocess/test_matrix.py::test_same_training_as_one_process",)),
    Row("other numbers of ranks after every stop", "random plans of stops and world sizes",
        "one order of samples, each used floor or ceil(consumed / N) times",
        (DATA + "random_plans_of_stops_and_world_sizes_give_one_order",)),
    Row("batches that were prefetched, not trained on", "loaders with and without workers", "do not count",
        (DATA + "resume_continues_exactly",)),
    Row("fewer samples than a batch, fewer shards than ranks, an epoch that ends inside a batch", "tiny data",
        "every sample once an epoch, in one order for any number of ranks",
        (PROCESSES + "fewer_samples_than_a_batch_and_fewer_shards_than_ranks",)),
    Row("a batch that the ranks cannot share", "7 samples on 2 ranks, and others",
        "refused before the first step, with the nearest that fit",
        (LAUNCH + "a_batch_that_two_ranks_cannot_share_is_refused_by_both",
         DATA + "batches_that_do_not_divide_name_those_that_do")),
    Row("other versions of Python and numpy, another hash seed",
        "golden hashes; each test process has its own hash seed", "the order of samples never changes",
        (ORDER + "order_never_drifts",)),
    Row("a save that is killed", "before each of its writes, renames and syncs",
        "the checkpoint before or the new one, never a mix", (STORE + "killed_anywhere",)),
    Row("a rank that is killed at any point of a save", "fail points, on each of two ranks",
        "the checkpoint before or the new one, never a mix; nothing unfinished is left",
        (RANKS_TESTS + "killed_at_every_point",)),
    Row("a disk that hangs during a save", "a write that does not return", "this save fails, the next one works",
        ("tests/checkpoint/test_pieces.py::test_a_disk_that_hangs_fails_the_save_and_no_other",)),
    Row("a checkpoint of an older format", "written by the earlier code", "is read",
        ("tests/checkpoint/test_pieces.py::test_older_checkpoints_are_read",)),
    Row("a pickle from a stranger", "a crafted DeepSpeed or DCP folder", "is refused, not run, without --trust-pickle",
        ("tests/checkpoint/test_convert.py::test_nothing_is_unpickled_without_trust",)),
    Row("a file of a checkpoint that is damaged, cut, empty or missing", "bytes edited",
        "named and set aside, the one before is taken; never a fresh start",
        (STORE + "damage_falls_back_to_the_one_before", STORE + "no_fresh_start_over_damaged_checkpoints")),
    Row("disk full during a save", "a small file system", "the save fails with a clear text, training goes on",
        (STORE + "a_disk_that_is_full", LOOP + "training_survives_a_save_that_fails")),
    Row("a gradient that is not finite, on one rank", "NaN and infinity put in", "the step changes nothing on any rank",
        (ENGINE + "step_without_finite_gradients_changes_nothing_on_any_rank",)),
    Row("several such steps in a row, or a spike of the loss", "NaN and spikes put in",
        "back to the last checkpoint, the data go on behind the bad window; the second time exit code 71",
        (FAULTS + "a_loss_that_is_not_finite_on_one_rank_is_left_out_by_both",
         "tests/train/test_guard.py::test_a_spike_of_the_loss_sends_the_run_back",
         "tests/train/test_guard.py::test_a_run_that_comes_to_grief_twice_at_one_place_gives_up")),
    Row("other data or another base at a resume", "both replaced", "refused",
        (LOOP + "a_resume_goes_on_in_the_data_where_it_was_and_refuses_other_data_or_another_base",)),
    Row("a shard that is damaged before it is indexed", "bytes edited: every header, every length", "refused by name",
        (SHARDS + "damage_is_named", SHARDS + "no_damage_to_a_header_goes_unseen",
         SHARDS + "no_truncation_goes_unseen")),
    Row("a sample that changes after it was indexed", "bytes edited",
        "substituted alike for any number of ranks, counted, within a budget",
        (DATA + "changed_bytes_are_substituted_counted_and_named", DATA + "beyond_the_budget_is_an_error")),
    Row("members of a shard that are no sample files", "links, devices, pipes", "refused by name",
        (SHARDS + "unfit_members_are_refused", SHARDS + "members_that_are_no_regular_files_are_refused")),
    Row("pictures that are cut, too large or of another format", "crafted files", "bad samples, before memory is spent",
        (DECODE + "cut_pictures_are_bad_samples", DECODE + "large_pictures_are_refused_before_they_are_loaded",
         DECODE + "other_formats_are_refused")),
)  # fmt: skip
