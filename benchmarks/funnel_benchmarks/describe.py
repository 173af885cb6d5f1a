"""What was measured where, in words, from the head of a result file."""

from funnel_benchmarks.results import Row


def describe_model(model: Row) -> str:
    return (
        f"{model['name']}: {model['layers']} layers of width {model['hidden_size']}, "
        f"{model['parameters'] / 1e6:,.0f} M parameters ({model['weights']}), {model['dtype']}, {model['attention']}"
    )


def describe_machine(machine: Row) -> str:
    kernels = machine.get("kernel_instruction_set")  # and its limit, if there is one
    parts = (machine["cpu"], f"{machine['cores']} cores", kernels)
    return f"{', '.join(machine['devices'])}; {', '.join(filter(None, parts))}"


def describe_backend(options: Row) -> str:
    return f"{options['backend']}, served by {options['served_by']}"
