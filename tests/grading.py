"""What lm-evaluation-harness makes of answers, without a model."""


def outcomes(task, answers):
    """The scores by metric that a task of the harness gives each answer to its first item."""
    task.build_all_requests(limit=1)
    (instance,) = task.instances
    for answer in answers:
        instance.resps = [answer]
        task.apply_filters()
        (filtered,) = instance.filtered_resps.values()
        yield task.process_results(instance.doc, [filtered])
