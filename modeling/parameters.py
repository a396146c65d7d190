"""Parameters of layers in the form that convolutions and matrix products use: norms folded, in the dtype of compute.

A layer that calls `prepare` computes this form in each run, by default. Within `stored` it reads it from variables,
which one op fills: for inference, where weights stay as they are. Within `packed` all layers together compute it at
once: for training on a GPU, where each of some thousand launches costs more than its arithmetic.

Shapes: C output channels.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from . import device

tfv1 = tf.compat.v1
STORED = "stored_parameters"  # graph collection of the variables of `stored`


class Norm(NamedTuple):
    """The variables of a batch norm with stored statistics, float32 [C]."""

    gamma: tf.Tensor
    beta: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    epsilon: float  # added to the variance


class Parameters(NamedTuple):
    """The variables of a layer, as TensorFlow's ops take them."""

    kernel: tf.Tensor  # float32 [..., C]
    bias: tf.Tensor | None  # float32 [C]
    norm: Norm | None = None  # follows the layer; then there is no bias


class _Request(NamedTuple):
    """The parameters that a layer asks for, and the dtypes that it wants."""

    parameters: Parameters
    dtype: tf.DType
    bias_dtype: tf.DType


_answer = contextvars.ContextVar("answer", default=None)


def prepare(
    create: Callable[[], Parameters], dtype: tf.DType, *, bias_dtype: tf.DType | None = None
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """The kernel and the bias of a layer, with its norm folded: y * scale + shift = conv(x, kernel * scale) + shift.

    Args:
        create: creates the layer's variables in the current variable scope, which identifies the layer.
        dtype: of the kernel. bias_dtype: of the bias, if that differs.
    Returns:
        kernel [..., C]; bias [C], or None if the layer has neither bias nor norm
    """

    def request():
        return _Request(create(), dtype, bias_dtype or dtype)

    answer = _answer.get()
    return answer(request) if answer else _fold([request()])[0]


@contextlib.contextmanager
def _answering(answer):
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def _fold(requests):
    """Returns the pairs (kernel, bias) of a list of `_Request`."""
    norms = [request.parameters.norm for request in requests if request.parameters.norm]
    folded = zip(*_scales_and_shifts(norms))
    kernels, biases = [], []
    for kernel, bias, norm in (request.parameters for request in requests):
        scale, bias = next(folded) if norm else (None, bias)
        kernels.append(kernel if scale is None else kernel * scale)
        biases.append(bias)
    kernels = _cast(kernels, [request.dtype for request in requests])
    return list(zip(kernels, _cast(biases, [request.bias_dtype for request in requests])))


def _scales_and_shifts(norms):
    """Returns what norms compute as y = x * scale + shift: two lists of float32 [C]."""
    if not norms:
        return [], []
    gammas, betas, means, variances, epsilons = zip(*norms)
    epsilons = [tf.fill(x.shape, epsilon) for x, epsilon in zip(gammas, epsilons)]
    scales = map_packed(
        lambda gamma, variance, epsilon: gamma * tf.math.rsqrt(variance + epsilon), gammas, variances, epsilons
    )
    return scales, map_packed(lambda beta, mean, scale: beta - mean * scale, betas, means, scales)


def _cast(tensors, dtypes):
    """Casts each tensor of a list, or None, to its dtype."""
    results = list(tensors)
    for wanted in set(dtypes):
        places = [i for i, x in enumerate(tensors) if x is not None and dtypes[i] == wanted != x.dtype.base_dtype]
        if places:
            cast = map_packed(lambda x, dtype=wanted: tf.cast(x, dtype), [tensors[i] for i in places])
            for place, x in zip(places, cast):
                results[place] = x
    return results


def map_packed(function: Callable[..., tf.Tensor], *lists: list[tf.Tensor]) -> list[tf.Tensor]:
    """Applies an elementwise function to the tensors of lists, one of each at a time: a list of tensors.

    On a GPU it is applied once, to all joined to a vector: two launches take the place of one for each of 168 tensors.
    """
    if not device.is_gpu():
        return [function(*tensors) for tensors in zip(*lists)]
    parts = tf.split(function(*map(join, lists)), [x.shape.num_elements() for x in lists[0]])
    return [tf.reshape(part, x.shape) for part, x in zip(parts, lists[0])]


def join(tensors: list[tf.Tensor]) -> tf.Tensor:
    """All elements of a list of tensors of one dtype: a vector."""
    return tf.concat([tf.reshape(x, [-1]) for x in tensors], axis=0)


@contextlib.contextmanager
def stored() -> Iterator[list[tf.Operation]]:
    """Within the block, layers read their parameters from variables in the collection STORED.

    Yields:
        a list of the ops that fill them from the layers' own variables, complete at the end of the block
    """
    updates, known = [], {}

    def answer(request):
        scope = tfv1.get_variable_scope().name
        if scope not in known:
            known[scope] = [_store(x, updates) for x in _fold([request()])[0]]
        return known[scope]

    with _answering(answer):
        yield updates


def _store(x, updates):
    """Returns a variable for a tensor, or `x` itself if it needs none; adds the op that fills it to `updates`."""
    if x is None or isinstance(x, tf.Variable):
        return x
    with tf.name_scope("stored"):
        variable = tfv1.Variable(
            lambda: tf.zeros(x.shape, x.dtype), trainable=False, use_resource=True, collections=[STORED]
        )
        updates.append(variable.assign(x).op)
    return variable.read_value()


def packed(build: Callable[[], Any]) -> Any:
    """Calls `build`, which builds a network, and returns its result; on a GPU, the parameters are computed all at once.

    There, `build` is called twice: what it builds first only tells which parameters there are, and never runs.
    """
    if not device.is_gpu():
        return build()
    requests = {}

    def record(request):
        made = requests[tfv1.get_variable_scope().name] = request()
        return _fold([made])[0]

    with _answering(record), tf.name_scope("parameters"), _collecting_variables_only():
        build()
    with tf.name_scope("parameters"):
        answers = dict(zip(requests, map(_without_gradient_if_frozen, requests.values(), _fold([*requests.values()]))))
    scope = tfv1.variable_scope(tfv1.get_variable_scope(), reuse=True, auxiliary_name_scope=False)
    with _answering(lambda _: answers[tfv1.get_variable_scope().name]), scope:
        return build()


def _without_gradient_if_frozen(request, answer):
    """Stops the gradients of a frozen layer's kernel and bias: as parts of one tensor, all would get them."""
    kernel, bias, norm = request.parameters
    variables = [kernel, bias] if norm is None else [kernel, norm.gamma, norm.beta]
    if any(getattr(x, "trainable", True) for x in variables if x is not None):  # a tensor comes from a variable
        return answer
    return tuple(x if x is None else tf.stop_gradient(x) for x in answer)


@contextlib.contextmanager
def _collecting_variables_only():
    """Removes everything but variables that the block adds to the graph's collections."""
    graph = tfv1.get_default_graph()
    before = {name: len(graph.get_collection(name)) for name in graph.get_all_collection_keys()}
    yield
    for name in graph.get_all_collection_keys():
        collection = graph.get_collection_ref(name)
        start = before.get(name, 0)
        collection[start:] = [x for x in collection[start:] if _is_variable(x)]


def _is_variable(x):
    """Whether an item of a collection is a variable; what an assignment returns is a tf.Variable, too."""
    return isinstance(x, tf.Variable) and x.op.type in ("VarHandleOp", "VariableV2")
