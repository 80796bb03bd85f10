/* SPDX-License-Identifier: Apache-2.0 */
/* Who waits for whom in a qcow2 cluster: against a disk whose requests end when the test says so. */
#include <check.h>
#include <errno.h>

#include "block/cluster_order.h"
#include "tests/suite.h"
#include "tests/unit/block/rig.h"

#define CLUSTER 65536u
#define MOST	16

static struct block_request *under_way[MOST];
static unsigned nunder_way;
static int refusal; /* of the next submission */

static int take(struct block *blk, struct block_request *req)
{
	int rc = refusal;
	refusal = 0;
	if (!rc)
		under_way[nunder_way++] = req;
	return rc;
}

static const struct block_ops ops = {.name = "by hand", .submit = take};
static struct block disk = {.ops = &ops, .size_bytes = 1 << 30};
static struct cluster_order order;

struct asked {
	struct block_request req;
	int ended, result;
};

static void ended(struct block_request *req, int result)
{
	struct asked *a = req->opaque;
	a->ended++;
	a->result = result;
}

static int ask(struct asked *a, enum block_op op, uint64_t offset, uint64_t len)
{
	*a = (struct asked){
		.req = {.op = op, .offset_bytes = offset, .len_bytes = len, .done = ended, .opaque = a}};
	return cluster_order_submit(&order, &a->req);
}

/* True if it is with the disk; its place there in *at. */
static bool runs(const struct asked *a, unsigned *at)
{
	for (unsigned i = 0; i < nunder_way; i++)
		if (under_way[i]->op == a->req.op && under_way[i]->offset_bytes == a->req.offset_bytes &&
		    under_way[i]->len_bytes == a->req.len_bytes) {
			*at = i;
			return true;
		}
	return false;
}

#define ck_runs(a)  ck_assert(runs(a, &at))
#define ck_waits(a) ck_assert(!runs(a, &at) && !(a)->ended)

static void end(struct asked *a, int result)
{
	unsigned at;
	ck_runs(a);
	struct block_request *req = under_way[at];
	under_way[at] = under_way[--nunder_way];
	req->done(req, result);
	ck_assert_int_eq(a->ended, 1);
	ck_assert_int_eq(a->result, result);
}

static void setup(void)
{
	nunder_way = 0;
	refusal = 0;
	cluster_order_init(&order, &disk, CLUSTER);
}

static void teardown(void)
{
	ck_assert_uint_eq(nunder_way, 0);
	cluster_order_drain(&order);
	cluster_order_destroy(&order);
}

START_TEST(test_zeroing_is_alone_in_its_clusters)
{
	struct asked w1, w2, z, r, later, elsewhere, flush;
	unsigned at;
	ck_assert_int_eq(ask(&w1, BLOCK_WRITE, 0, 4096), 0);
	ck_assert_int_eq(ask(&w2, BLOCK_WRITE, CLUSTER - 512, 1024), 0); /* reaches into the second */
	ck_assert_int_eq(ask(&z, _i ? BLOCK_DISCARD : BLOCK_WRITE_ZEROES, CLUSTER + 8192, 4096), 0);
	ck_runs(&w1);
	ck_runs(&w2);
	ck_waits(&z);
	/* in the zeroing's cluster: behind it, a flush and another cluster's are not */
	ck_assert_int_eq(ask(&r, BLOCK_READ, CLUSTER, 512), 0);
	ck_assert_int_eq(ask(&later, BLOCK_WRITE, 2 * CLUSTER - 512, 512), 0);
	ck_assert_int_eq(ask(&elsewhere, BLOCK_WRITE, 2 * CLUSTER, 512), 0);
	ck_assert_int_eq(ask(&flush, BLOCK_FLUSH, 0, 0), 0);
	ck_waits(&r);
	ck_waits(&later);
	ck_runs(&elsewhere);
	end(&flush, 0);
	end(&w1, 0); /* another cluster */
	ck_waits(&z);
	end(&w2, -EIO);
	ck_runs(&z);
	ck_waits(&r);
	end(&z, 0);
	ck_runs(&r);
	ck_runs(&later);
	end(&r, 0);
	end(&later, 0);
	end(&elsewhere, 0);
}
END_TEST

START_TEST(test_reads_and_writes_only_where_clusters_are_compressed)
{
	struct asked r1, r2, w, r3;
	unsigned at;
	order.reads_apart = _i;
	ck_assert_int_eq(ask(&r1, BLOCK_READ, 0, 512), 0);
	ck_assert_int_eq(ask(&r2, BLOCK_READ, 0, 1024), 0);
	ck_assert_int_eq(ask(&w, BLOCK_WRITE, 4096, 512), 0);
	ck_assert_int_eq(ask(&r3, BLOCK_READ, 8192, 512), 0);
	ck_runs(&r1);
	ck_runs(&r2);
	if (_i) {
		ck_waits(&w);
		ck_waits(&r3);
	} else {
		ck_runs(&w);
		ck_runs(&r3);
	}
	end(&r1, 0);
	end(&r2, 0);
	end(&w, 0);
	end(&r3, 0);
}
END_TEST

START_TEST(test_refusals)
{
	struct asked w, z1, z2, late;
	unsigned at;
	refusal = -ENOTCONN;
	ck_assert_int_eq(ask(&w, BLOCK_WRITE, 0, 512), -ENOTCONN);
	ck_assert_int_eq(w.ended, 0);
	/* one that waited is refused when its turn comes: told by done(), and the next has its turn */
	ck_assert_int_eq(ask(&w, BLOCK_WRITE, 0, 512), 0);
	ck_assert_int_eq(ask(&z1, BLOCK_WRITE_ZEROES, 512, 512), 0);
	ck_assert_int_eq(ask(&z2, BLOCK_WRITE_ZEROES, 1024, 512), 0);
	ck_assert_int_eq(ask(&late, BLOCK_WRITE, 2048, 512), 0);
	refusal = -EPIPE;
	end(&w, 0);
	ck_assert_int_eq(z1.ended, 1);
	ck_assert_int_eq(z1.result, -EPIPE);
	ck_runs(&z2);
	ck_waits(&late);
	end(&z2, 0);
	end(&late, 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("cluster order");
	TCase *t = tcase_create("order");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_loop_test(t, test_zeroing_is_alone_in_its_clusters, 0, 2);
	tcase_add_loop_test(t, test_reads_and_writes_only_where_clusters_are_compressed, 0, 2);
	tcase_add_test(t, test_refusals);
	suite_add_tcase(s, t);
	return suite_run(s);
}
