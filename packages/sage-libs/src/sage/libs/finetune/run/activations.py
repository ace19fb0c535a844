"""Number of values that one token adds to the memory of a training step, derived from the code of the step."""

from dataclasses import dataclass

from sage.libs.models.architecture import Architecture

#: Block size of `kernels.attention`, in tokens. For a sample of at most this many tokens, the attention weights are saved.
BLOCK_TOKENS = 256
#: `kernels.attention` pads the length of each sample to a multiple of this number of tokens.
_LENGTH_MULTIPLE = 32
#: Number of linear layers with an adapter in each transformer layer. Each of these linear layers saves the product of its
#: input and the LoRA matrix A.
_ADAPTED = 7


@dataclass(frozen=True)
class Activations:
    """The activations of a training step.

    The float fields are numbers of values for each token. The size of a value depends on the data type.
    """

    saved: float  #: saved by one layer for the backward pass
    inner: float  #: saved outputs of the LoRA matrices A of one layer, in the data type of the matrix products
    layer_input: float  #: the input of one layer; with gradient checkpointing, a layer saves only this input
    backward: float  #: temporary tensors in the backward pass of the largest part of a layer
    weights_heads: int  #: number of heads whose attention weights are saved for a short sample
    layers: int

    def attention_values(self, length: int) -> int:
        """Return the number of attention weights that one layer saves for a sample of `length` tokens."""
        if length > BLOCK_TOKENS:
            return 0
        return self.weights_heads * (-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE) ** 2

    def block_values(self, length: int, heads: int) -> int:
        """Return the number of values in the attention scores, attention weights and gradients of one block of queries.

        length: number of tokens of the sample.
        """
        return 3 * heads * min(length, BLOCK_TOKENS) * length


def kernel_activations(sizes: Architecture, rank: int) -> Activations:
    """Return the activations of SAGE's training step (`kernels.install`).

    Each layer saves the inputs of both norms, the queries, keys and values of the attention, the input of the output
    projection, and the outputs of `gate_proj` and `up_proj`. All other values are computed again in the backward pass.
    """
    hidden, query, key, inner = sizes.hidden_size, sizes.query_size, sizes.key_value_size, sizes.intermediate_size
    return Activations(
        saved=2 * hidden + 2 * query + 2 * key + 2 * inner,
        inner=_ADAPTED * rank,
        layer_input=hidden,
        backward=4 * inner + 3 * hidden,
        weights_heads=sizes.num_attention_heads,
        layers=sizes.num_hidden_layers,
    )


def plain_activations(sizes: Architecture, rank: int, *, autocast: bool) -> Activations:
    """Return the activations of the training step of transformers and PEFT.

    Each layer saves the inputs and outputs of both norms, the queries, keys, values and output of the attention, the outputs
    of `gate_proj`, `up_proj` and the activation function, and the input of `down_proj`.

    autocast: whether matrix products are in bf16. If so, each matrix product saves a bf16 copy of its input, and the norms
    save fp32 values. An fp32 value counts as two values.
    """
    hidden, query, key, inner = sizes.hidden_size, sizes.query_size, sizes.key_value_size, sizes.intermediate_size
    return Activations(
        saved=(10 if autocast else 4) * hidden + 2 * query + 2 * key + 4 * inner,
        inner=_ADAPTED * rank,
        layer_input=hidden,
        backward=3 * inner + 2 * hidden,
        weights_heads=0,
        layers=sizes.num_hidden_layers,
    )
