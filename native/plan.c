/* Whether a plan stays inside the memory it names. Everything is checked here, before the first byte moves: kernels check nothing. */
#include "plan.h"

#include <stdarg.h>
#include <stdio.h>

int64_t lmkv_refuse(char *why, size_t room, const char *form, ...) {
    va_list values;
    va_start(values, form);
    if (why && room) vsnprintf(why, room, form, values);
    va_end(values);
    return -1;
}

static const int64_t FAR = (int64_t)1 << 56; /* bytes: more than any address space has, and far from where 64 bits end */

/* Whether n steps of a stride lead out of any memory; n is at least 1. */
static int too_far(int64_t n, int64_t stride) { return stride > FAR / n || stride < -FAR / n; }

static int64_t check_rows(const lmkv_plan *plan, char *why, size_t room) {
    for (int64_t r = 0; r < plan->n_rows; r++) {
        const lmkv_row *row = &plan->rows[r];
        if (!row->base) return lmkv_refuse(why, room, "row %lld: expected an address; got null", (long long)r);
        if (row->blocks < 1 || row->block_tokens < 1 || row->heads < 1 || row->run < 1)
            return lmkv_refuse(why, room, "row %lld: expected at least one block, token, head and byte; got %lld, %lld, %lld, %lld",
                               (long long)r, (long long)row->blocks, (long long)row->block_tokens, (long long)row->heads,
                               (long long)row->run);
        if (row->offset < 0) return lmkv_refuse(why, room, "row %lld: expected an offset of at least 0; got %lld", (long long)r, (long long)row->offset);
        if (too_far(row->blocks, row->block_stride) || too_far(row->block_tokens, row->token_stride) ||
            too_far(row->heads, row->head_stride) || too_far(row->heads, row->run))
            return lmkv_refuse(why, room, "row %lld: expected strides within 2^56 bytes; got %lld, %lld, %lld for blocks, tokens, heads of %lld bytes",
                               (long long)r, (long long)row->block_stride, (long long)row->token_stride, (long long)row->head_stride,
                               (long long)row->run);
        if (row->table < 0 || row->table >= plan->tables)
            return lmkv_refuse(why, room, "row %lld: expected a block table from 0 to %lld; got %lld", (long long)r,
                               (long long)plan->tables - 1, (long long)row->table);
    }
    return 0;
}

static int64_t check_parts(const lmkv_plan *plan, char *why, size_t room) {
    int64_t ends = 1; /* bytes that a token takes in a payload */
    for (int64_t r = 0; r < plan->n_rows; r++) {
        const lmkv_row *row = &plan->rows[r];
        if (row->offset > FAR) return lmkv_refuse(why, room, "row %lld: expected an offset within 2^56 bytes; got %lld", (long long)r, (long long)row->offset);
        if (row->offset + row->heads * row->run > ends) ends = row->offset + row->heads * row->run;
    }
    for (int64_t p = 0; p < plan->n_parts; p++) {
        const lmkv_part *part = &plan->parts[p];
        if (!part->payload) return lmkv_refuse(why, room, "part %lld: expected an address; got null", (long long)p);
        if (part->first < 0 || part->tokens < 0 || part->held < 0 || part->first > part->held - part->tokens)
            return lmkv_refuse(why, room, "part %lld: expected tokens within the %lld held; got %lld from %lld on", (long long)p,
                               (long long)part->held, (long long)part->tokens, (long long)part->first);
        if (part->held && too_far(part->held, ends))
            return lmkv_refuse(why, room, "part %lld: expected a payload within 2^56 bytes; got %lld tokens of %lld bytes", (long long)p,
                               (long long)part->held, (long long)ends);
        if (part->at < 0 || part->at > plan->n_places - part->tokens)
            return lmkv_refuse(why, room, "part %lld: expected places within the %lld of a table; got %lld from %lld on", (long long)p,
                               (long long)plan->n_places, (long long)part->tokens, (long long)part->at);
    }
    return 0;
}

/* The first of some places that is in no row, -1 if all are or are left out; adds how many are not left out. Somebody waits: pieces
 * are looked through without a branch, so that the compiler takes several places at a time. */
static int64_t first_wrong(const lmkv_place *places, int64_t n, int64_t blocks, int64_t tokens, int64_t *used) {
    int32_t last_block = blocks <= INT32_MAX ? (int32_t)(blocks - 1) : INT32_MAX;
    int32_t last_token = tokens <= INT32_MAX ? (int32_t)(tokens - 1) : INT32_MAX;
    for (int64_t begin = 0; begin < n; begin += 1024) {
        int32_t count = (int32_t)(n - begin < 1024 ? n - begin : 1024), wrong = 0, here = 0;
        const lmkv_place *some = places + begin;
        for (int32_t t = 0; t < count; t++) {
            int32_t named = some[t].block >= 0;
            here += named;
            wrong |= named & ((some[t].block > last_block) | (some[t].index < 0) | (some[t].index > last_token));
        }
        *used += here;
        for (int32_t t = 0; wrong && t < count; t++) {
            if (some[t].block >= 0 && (some[t].block > last_block || some[t].index < 0 || some[t].index > last_token)) return begin + t;
        }
    }
    return -1;
}

/* Bytes of one place in a table: the rows that read it; refuses a place outside any of them. */
static int64_t check_table(const lmkv_plan *plan, int64_t table, char *why, size_t room) {
    int64_t blocks = INT64_MAX, tokens = INT64_MAX, bytes = 0, total = 0;
    for (int64_t r = 0; r < plan->n_rows; r++) {
        const lmkv_row *row = &plan->rows[r];
        if (row->table != table) continue;
        if (row->blocks < blocks) blocks = row->blocks;
        if (row->block_tokens < tokens) tokens = row->block_tokens;
        bytes += row->heads * row->run;
    }
    if (!bytes) return 0;
    for (int64_t p = 0; p < plan->n_parts; p++) {
        const lmkv_part *part = &plan->parts[p];
        const lmkv_place *places = plan->places + table * plan->n_places + part->at;
        int64_t wrong = first_wrong(places, part->tokens, blocks, tokens, &total);
        if (wrong >= 0)
            return lmkv_refuse(why, room, "part %lld, token %lld: expected a block below %lld and a token in it below %lld; got %d and %d",
                               (long long)p, (long long)wrong, (long long)blocks, (long long)tokens, places[wrong].block, places[wrong].index);
    }
    return total * bytes;
}

int64_t lmkv_check(const lmkv_plan *plan, char *why, size_t room) {
    int64_t total = 0;
    if (plan->n_rows < 0 || plan->n_parts < 0 || plan->n_places < 0 || plan->tables < 0)
        return lmkv_refuse(why, room, "expected counts of at least 0; got %lld rows, %lld parts, %lld places, %lld tables",
                           (long long)plan->n_rows, (long long)plan->n_parts, (long long)plan->n_places, (long long)plan->tables);
    if ((plan->n_rows && !plan->rows) || (plan->n_parts && !plan->parts) || (plan->n_places && plan->tables && !plan->places))
        return lmkv_refuse(why, room, "expected addresses of rows, parts and places; got null");
    if (plan->tables && plan->n_places > FAR / plan->tables)
        return lmkv_refuse(why, room, "expected places within 2^56; got %lld tables of %lld", (long long)plan->tables, (long long)plan->n_places);
    if (check_rows(plan, why, room) < 0 || check_parts(plan, why, room) < 0) return -1;
    for (int64_t table = 0; table < plan->tables; table++) {
        int64_t bytes = check_table(plan, table, why, room);
        if (bytes < 0) return -1;
        total += bytes;
    }
    return total;
}

int lmkv_version(void) { return 3; }
