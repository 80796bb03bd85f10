/* SPDX-License-Identifier: Apache-2.0 */
/* What two files must have in common to stand for one another as a backing file. */
#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "block/open.h"

#define PIECE_BYTES (UINT64_C(1) << 20)
#define HASH_BYTES  32

struct hasher {
	EVP_MD_CTX *all;
	uint8_t *buf, *zeroes;
	uint8_t zero_hash[HASH_BYTES]; /* of a whole piece */
};

static int hash_piece(const uint8_t *data, uint64_t len, uint8_t out[HASH_BYTES])
{
	return EVP_Digest(data, len, out, NULL, EVP_sha256(), NULL) == 1 ? 0 : -ENOMEM;
}

/* True if the whole range is a hole, as far as the disk tells cheaply. */
static bool is_hole(struct block *blk, uint64_t at, uint64_t len)
{
	struct block_extent x[8];
	unsigned n = 8;
	if (block_extents(blk, at, len, x, &n, NULL))
		return false;
	uint64_t seen = 0;
	for (unsigned i = 0; i < n && x[i].zero; i++)
		seen += x[i].len_bytes;
	return seen >= len;
}

static int add_piece(struct hasher *h, struct block *blk, uint64_t at, uint64_t len, struct error *err)
{
	uint8_t hash[HASH_BYTES];
	int rc;
	if (len == PIECE_BYTES && is_hole(blk, at, len)) {
		memcpy(hash, h->zero_hash, sizeof hash);
	} else {
		rc = block_pread(blk, h->buf, len, at);
		if (rc)
			return error_errno(err, rc, "%s: read at %llu", blk->label, (unsigned long long)at);
		rc = hash_piece(h->buf, len, hash);
		if (rc)
			return error_errno(err, rc, "SHA-256");
	}
	return EVP_DigestUpdate(h->all, hash, sizeof hash) == 1 ? 0 : error_errno(err, ENOMEM, "SHA-256");
}

static int run(struct hasher *h, struct block *blk, bool (*stop)(void *opaque), void *opaque,
	       uint8_t out[HASH_BYTES], struct error *err)
{
	if (!h->all || !h->buf || !h->zeroes || hash_piece(h->zeroes, PIECE_BYTES, h->zero_hash) ||
	    EVP_DigestInit_ex(h->all, EVP_sha256(), NULL) != 1)
		return error_errno(err, ENOMEM, "SHA-256");
	for (uint64_t at = 0; at < blk->size_bytes;) {
		uint64_t len = blk->size_bytes - at < PIECE_BYTES ? blk->size_bytes - at : PIECE_BYTES;
		if (stop && stop(opaque))
			return error_set(err, ECANCELED, "%s: stopped reading", blk->label);
		int rc = add_piece(h, blk, at, len, err);
		if (rc)
			return rc;
		at += len;
	}
	return EVP_DigestFinal_ex(h->all, out, NULL) == 1 ? 0 : error_errno(err, ENOMEM, "SHA-256");
}

int block_content_hash(struct block *blk, bool (*stop)(void *opaque), void *opaque,
		       char hex[BLOCK_CONTENT_HEX_CHARS + 1], struct error *err)
{
	void *mem = NULL;
	struct hasher h = {.all = EVP_MD_CTX_new(), .zeroes = calloc(1, PIECE_BYTES)};
	if (posix_memalign(&mem, 4096, PIECE_BYTES) == 0)
		h.buf = mem;
	uint8_t out[HASH_BYTES];
	int rc = run(&h, blk, stop, opaque, out, err);
	EVP_MD_CTX_free(h.all);
	free(h.buf);
	free(h.zeroes);
	for (unsigned i = 0; !rc && i < sizeof out; i++)
		snprintf(hex + 2 * i, 3, "%02x", out[i]);
	return rc;
}
