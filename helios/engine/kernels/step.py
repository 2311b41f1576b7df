"""A step of a model on a CPU, from token ids to tokens, and bursts of steps.

Everything between products is float32. Each row is computed in an order that no other row changes, so its
result does not depend on the rest of the batch.

Addresses are integers and nothing is checked here; the caller owns the tensors. Kernels release the GIL.
docs/decisions/0009-compiled-kernels.md gives the reasons for this design.
"""

from helios.engine.kernels.barrier import meet, share
from helios.engine.kernels.context import block_table
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layer import layers_scratch, propagate, propagate_scratch, run_layers
from helios.engine.kernels.layout import (
    BFLOAT16,
    CONFIDENCE,
    FLOAT16,
    SUMMARY,
    BatchAddresses,
    Outputs,
)
from helios.engine.kernels.norm import norm
from helios.engine.kernels.product import plain, product, product_scratch
from helios.engine.kernels.sampling import draw
from helios.engine.kernels.simd import (
    LANES,
    load_bfloat,
    load_half,
    load_long,
    load_shared,
    load_single,
    load_some,
    store_long,
    store_shared,
    store_single,
    store_some,
)
from helios.engine.kernels.summary import summarize

# Bytes that a dynamic step keeps per row besides its state: six int64.
_ROW_BYTES = 48


@compiled
def run_burst(thread, steps, model, layers, exits, is_dynamic, cache, batch, draws, stop, room):
    """One thread's part of one step, or of several decode steps. Each uses the tokens of the step before.

    model: MODEL; layers: LAYER [all]; exits: EXIT [E], ascending. The last exit takes all remaining rows.
    is_dynamic: whether decode rows leave where they are confident; otherwise each row's exit is known before
    the step. The other arguments are as in `layout`. `room.out` gets the logits of the last step, and [steps,
    reads] of everything else. The tables include the blocks of all tokens of the burst.
    """
    out = room.out
    for index in range(steps):
        if is_dynamic:
            _step_dynamic(thread, model, layers, exits, cache, batch, room.scratch, room.found, out)
        else:
            _step(thread, model, layers, exits, cache, batch, room.scratch, out)
        if len(draws.rows):
            if is_dynamic:
                # One thread copies the outputs of rows that left early, and the others must wait for it.
                meet(thread)
            draw(thread, draws, index, out, batch.reads, model.vocabulary, room.drawing)
        if index + 1 == steps:
            return
        meet(thread)
        if thread.number == 0:
            _advance(batch, cache.block_tokens, out.best, stop, index + 1)
        meet(thread)
        if stop.interrupt and load_shared(stop.interrupt, 1):
            return
        reads = batch.reads
        out = Outputs(
            out.logits,
            out.best + 8 * reads,
            out.summaries + 4 * SUMMARY * reads,
            out.exit_layers + 8 * reads,
        )


@compiled
def _advance(batch, block_tokens, tokens, stop, taken):
    """Makes the tokens of a step, int64 [rows], the input of the next one.

    If the burst ends here, notes in `stop` how many steps were taken.
    """
    interrupt, last_tokens = stop.interrupt, stop.last_tokens
    if interrupt and load_shared(interrupt, 0):
        store_shared(interrupt, 1, taken)
    for row in range(batch.rows):
        token = load_long(tokens, row)
        if interrupt and row < len(last_tokens):
            for place in range(last_tokens.shape[1]):
                if token == last_tokens[row, place]:
                    store_shared(interrupt, 1, taken)
        position = load_long(batch.positions, row) + 1
        table = block_table(batch, row)
        slot = load_long(table, position // block_tokens) * block_tokens + position % block_tokens
        store_long(batch.token_ids, row, token)
        store_long(batch.positions, row, position)
        store_long(batch.slots, row, slot)


@compiled
def _step(thread, model, layers, exits, cache, batch, scratch, out):
    """One thread's part of a step whose rows leave at exits that are known before.

    The rows that go on after an exit are always the first ones (`EXIT.staying`). So no row moves, and after
    the last layer each row's state is the one at its own exit. scratch: `step_scratch` bytes, at the end the
    states of all rows first; the rest as in `run_burst`.
    """
    reads, width = batch.reads, model.width
    hidden = scratch
    x = hidden + 4 * batch.rows * width
    _enter(thread, model, batch, hidden, x)
    count, first = batch.rows, 0
    for index in range(len(exits)):
        running = _moved(batch, count, batch.positions, batch.slots, batch.row_tables)
        run_layers(thread, model, layers, first, exits[index].layer, hidden, running, cache, x)
        if not model.norm_before:
            # The layers ended with norms, which each thread computed only for its own rows.
            meet(thread)
        count, first = exits[index].staying, exits[index].layer
    # The rows of all exits are read together, because the LM head's weights are read once for all.
    start, end = share(thread, reads)
    for read in range(start, end):
        row = load_long(batch.read_rows, read)
        at_exit = exits[_exit_of(exits, row)]
        state, target = hidden + 4 * row * width, x + 4 * read * width
        if at_exit.norm.weight:
            norm(model, at_exit.norm, state, 0, 1, target)
        else:
            _copy_row(state, target, width)
        store_long(out.exit_layers, read, at_exit.layer)
    other = x + 4 * reads * width
    rest = other + 4 * reads * max(width, model.embedding.width)
    if _have_linear(exits):
        _apply_linear(thread, model, exits, batch, x, other, rest)
        x, other = other, x
    _predict(thread, model, x, reads, other, rest, out)


@compiled
def _exit_of(exits, row):
    """Index of the exit at which a row leaves when exits are known before the step."""
    index = 0
    while row < exits[index].staying:
        index += 1
    return index


@compiled
def _have_linear(exits):
    """Whether any of the exits has a linear layer."""
    found = False
    for index in range(len(exits)):
        found = found or exits[index].linear.weights != 0
    return found


@compiled
def _apply_linear(thread, model, exits, batch, x, out, scratch):
    """Applies the linear layer of each read row's exit: x to out, float32 [reads, width] each.

    The thread has prepared its own rows of x. When it returns, the thread can read its own rows of out.
    """
    reads, width = batch.reads, model.width
    start, end = share(thread, reads)
    if len(exits) > 1:
        # Threads divide the rows of one exit in another way than all rows.
        meet(thread)
    first = 0
    while first < reads:
        # Rows first..last are read at the same exit.
        index, last = _exit_of(exits, load_long(batch.read_rows, first)), first + 1
        while last < reads and _exit_of(exits, load_long(batch.read_rows, last)) == index:
            last += 1
        linear, source, target = exits[index].linear, x + 4 * first * width, out + 4 * first * width
        if linear.weights:
            product(thread, model.precision, linear, source, last - first, plain(linear, target), scratch)
        else:
            for read in range(max(start, first), min(end, last)):
                _copy_row(x + 4 * read * width, out + 4 * read * width, width)
        first = last


@compiled
def _step_dynamic(thread, model, layers, exits, cache, batch, scratch, found, out):
    """One thread's part of a step whose decode rows leave where they are confident.

    At each exit but the last, decode rows leave that reach the confidence of the exit. The KV of layers that
    a row skips is computed from its state at the exit. found: outputs of intermediate exits, used only with
    several exits; scratch: `step_scratch` bytes; the rest as in `run_burst`.
    """
    rows, decode_rows, reads = batch.rows, batch.decode_rows, batch.reads
    width, vocabulary = model.width, model.vocabulary
    # These lists hold the rows that have not left, decode rows first. When rows leave, the others move up.
    positions = scratch
    slots, row_tables = positions + 8 * rows, positions + 16 * rows
    origins = positions + 24 * rows
    left_slots, left_positions = positions + 32 * rows, positions + 40 * rows
    hidden = positions + _ROW_BYTES * rows
    x = hidden + 4 * rows * width
    _enter(thread, model, batch, hidden, x)
    last = len(exits) - 1
    running = batch
    if last:
        running = _moved(batch, rows, positions, slots, row_tables)
        if thread.number == 0:
            for row in range(rows):
                store_long(positions, row, load_long(batch.positions, row))
                store_long(slots, row, load_long(batch.slots, row))
                store_long(row_tables, row, load_long(batch.row_tables, row))
                store_long(origins, row, row)
        meet(thread)
    count, active, first = rows, decode_rows, 0
    for index in range(last + 1):
        exit_layer, threshold = exits[index].layer, exits[index].threshold
        run_layers(thread, model, layers, first, exit_layer, hidden, running, cache, x)
        if not model.norm_before:
            # The layers ended with norms, which each thread computed only for its own rows.
            meet(thread)
        first = exit_layer
        if index == last or active == 0:
            continue
        start, end = share(thread, active)
        for row in range(start, end):
            _copy_row(hidden + 4 * row * width, x + 4 * row * width, width)
        _leave(thread, model, exits[index], x, active, x + 4 * active * width, found)
        leaving = 0
        for row in range(active):
            leaving += load_single(found.summaries, SUMMARY * row + CONFIDENCE) >= threshold
        if leaving == 0:
            continue
        if thread.number == 0:
            gone = 0
            for row in range(count):
                if row < active and load_single(found.summaries, SUMMARY * row + CONFIDENCE) >= threshold:
                    _hand_over(found, row, out, load_long(origins, row), vocabulary, exit_layer)
                    _copy_row(hidden + 4 * row * width, x + 4 * gone * width, width)
                    store_long(left_slots, gone, load_long(slots, row))
                    store_long(left_positions, gone, load_long(positions, row))
                    gone += 1
                elif gone:
                    _copy_row(hidden + 4 * row * width, hidden + 4 * (row - gone) * width, width)
                    store_long(positions, row - gone, load_long(positions, row))
                    store_long(slots, row - gone, load_long(slots, row))
                    store_long(row_tables, row - gone, load_long(row_tables, row))
                    store_long(origins, row - gone, load_long(origins, row))
        meet(thread)
        skipped_to, propagated = exits[last].layer, x + 4 * leaving * width
        propagate(
            thread,
            model,
            layers,
            first,
            skipped_to,
            x,
            leaving,
            left_slots,
            left_positions,
            cache,
            propagated,
        )
        active, count = active - leaving, count - leaving
        running = _moved(batch, count, positions, slots, row_tables)
        if count == 0:
            return
    # Decode rows are read in order. Prefill rows follow them and have moved up by the rows that left.
    gone = decode_rows - active
    remaining = reads - gone
    start, end = share(thread, remaining)
    for read in range(start, end):
        row = read if read < active else load_long(batch.read_rows, read + gone) - gone
        _copy_row(hidden + 4 * row * width, x + 4 * read * width, width)
    target = found if gone else out
    _leave(thread, model, exits[last], x, remaining, x + 4 * remaining * width, target)
    for read in range(start, end):
        if gone:
            origin = load_long(origins, read) if read < active else read + gone
            _hand_over(found, read, out, origin, vocabulary, first)
        else:
            store_long(out.exit_layers, read, first)


@compiled
def step_scratch(model, rows):
    """Work bytes of a step: what a dynamic one keeps per row, states, and the largest of three work spaces.

    They are those of the layers, of reading out, and of rows that leave early (their states and propagation).
    """
    width = model.width
    wide = max(width, model.embedding.width)
    reading = 4 * rows * (width + wide) + product_scratch(model.precision, rows, wide)
    leaving = 4 * rows * width + propagate_scratch(model, rows)
    return rows * (_ROW_BYTES + 4 * width) + max(layers_scratch(model, rows), reading, leaving)


@compiled
def _moved(batch, rows, positions, slots, row_tables):
    """The batch with only its first rows, whose positions, slots and tables lie elsewhere."""
    return BatchAddresses(
        rows,
        batch.decode_rows,
        batch.reads,
        batch.token_ids,
        positions,
        slots,
        row_tables,
        batch.read_rows,
        batch.tables,
        batch.table_blocks,
    )


@compiled
def _enter(thread, model, batch, hidden, scratch):
    """Computes each thread's rows of the states before the first layer, float32 [rows, width]."""
    start, end = share(thread, batch.rows)
    if model.project_in.weights:
        _embed(model.embedding, batch.token_ids, start, end, scratch)
        rest = scratch + 4 * batch.rows * model.embedding.width
        into = plain(model.project_in, hidden)
        product(thread, model.precision, model.project_in, scratch, batch.rows, into, rest)
    else:
        _embed(model.embedding, batch.token_ids, start, end, hidden)
    if model.positions.table:
        _add_positions(model.positions, batch.positions, start, end, model.width, hidden)


@compiled
def _embed(embedding, token_ids, start, end, out):
    """The embeddings of the rows start..end, float32 [rows, embedding.width]."""
    table, precision, width = embedding.table, embedding.precision, embedding.width
    tile_tokens, together = embedding.tile_tokens, embedding.word_numbers
    for row in range(start, end):
        token_id = load_long(token_ids, row)
        source = token_id // tile_tokens * embedding.tile_numbers + token_id % tile_tokens * together
        target = row * width
        for first in range(0, width, together):
            for column in range(min(together, width - first)):
                store_single(out, target + first + column, _load_number(precision, table, source + column))
            source += tile_tokens * together


@compiled
def _add_positions(learned, positions, start, end, width, hidden):
    """Adds the learned vectors of their positions to rows start..end of hidden, float32 [rows, width]."""
    table, precision = learned.table, learned.precision
    for row in range(start, end):
        source, target = (load_long(positions, row) + learned.offset) * width, row * width
        for column in range(width):
            number = load_single(hidden, target + column) + _load_number(precision, table, source + column)
            store_single(hidden, target + column, number)


@compiled
def _load_number(precision, address, index):
    """Loads a number of a table as float32."""
    if precision == FLOAT16:
        return load_half(address, index)
    return load_bfloat(address, index) if precision == BFLOAT16 else load_single(address, index)


@compiled
def _leave(thread, model, at_exit, x, reads, scratch, outputs):
    """Reads tokens out of the states x, float32 [reads, width]. Each thread has prepared its own rows of x.

    at_exit: EXIT; outputs: all of them are written except the exit layers.
    """
    start, end = share(thread, reads)
    if at_exit.norm.weight:
        norm(model, at_exit.norm, x, start, end, x)
    other = scratch
    rest = other + 4 * reads * max(model.width, model.embedding.width)
    if at_exit.linear.weights:
        product(thread, model.precision, at_exit.linear, x, reads, plain(at_exit.linear, other), rest)
        x, other = other, x
    _predict(thread, model, x, reads, other, rest, outputs)


@compiled
def _predict(thread, model, x, reads, other, scratch, outputs):
    """Computes logits and summaries of x, the outputs of exit heads, float32 [reads, width].

    Each thread can read its own rows of x. other: space for as many states or embeddings; outputs: as in
    `_leave`.
    """
    precision = model.precision
    if model.project_out.weights:
        product(thread, precision, model.project_out, x, reads, plain(model.project_out, other), scratch)
        x = other
    product(thread, precision, model.lm_head, x, reads, plain(model.lm_head, outputs.logits), scratch)
    summarize(thread, outputs, reads, model.vocabulary)
    meet(thread)


@compiled
def _hand_over(found, row, out, read, vocabulary, exit_layer):
    """Copies a row of the outputs `found` to position `read` of the outputs `out`."""
    _copy_row(found.logits + 4 * row * vocabulary, out.logits + 4 * read * vocabulary, vocabulary)
    store_long(out.best, read, load_long(found.best, row))
    for column in range(SUMMARY):
        value = load_single(found.summaries, SUMMARY * row + column)
        store_single(out.summaries, SUMMARY * read + column, value)
    store_long(out.exit_layers, read, exit_layer)


@compiled
def _copy_row(source, target, width):
    """Copies a row of float32."""
    for column in range(0, width, LANES):
        count = width - column
        store_some(target, column, count, load_some(source, column, count))
