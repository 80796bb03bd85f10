/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handover of one VM from host S to host D: docs/handover.md in Promela. tests/model/run checks it with spin.
 *
 * Durable (survives every crash): the two records and the files. Everything else is volatile and dies with its process.
 * Every guarded command is one atomic step that makes at most one durable write, so a crash falls between any two steps.
 *
 * Faults are counted (CRASHES kills of a process or a host, CUTS breaks of the link or of the connection, FORCES uses of
 * `resolve --run-here`, ATTEMPTS moves tried); repairs (restart, healing) are free. Polling that would bring no news is left out. So the graph
 * of states has no cycle, which `pan -l` proves, and every run ends: the assertion at `timeout` is then the promise
 * that, whatever happened, all back up means settled.
 *
 * Ghosts: s_has/d_has say whether that side's copy contains every effect (acknowledged write, packet) that was ever let out.
 *
 * MUT_* break one rule each. Every mutant must be found wrong; that is how we know that this model can find errors.
 */
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef CUTS
#define CUTS 1
#endif
#ifndef FORCES
#define FORCES 1
#endif

/* record states */
mtype = { rNONE, rOWNER, rHANDING, rMOVED, rPREPARED, rOWNERU, rABANDONED };
/* messages of the control channel between the two snvmm; ASK and ANSWER travel on connections of their own */
mtype = { mSTATE, mREADY, mCOMMIT, mRUNNING, mMOVED, mACK };
/* phases of the source snvmm */
mtype = { pIDLE, pNEW, pCOPY, pHAND, pPAUSED, pSENT, pDOUBT, pDONE };
/* phases of the destination snvmm */
mtype = { qPREP, qREADY, qHELD, qFAILED, qOWNER, qRELEASED, qTOLD };

/* ---- durable: source */
mtype srec = rOWNER;
byte sepoch = 0;
bit sunconf = 0;   /* owner by --run-here, not yet acknowledged by the peer */
bit speerstarted = 0, speeracked = 0;
byte sfiles = 2;   /* 2 whole, 1 half deleted, 0 gone */
/* ---- durable: destination */
mtype drec = rNONE;
byte depoch = 0;
bit dfiles = 0;

/* ---- volatile */
bit sup = 1, dup = 1;  /* host has power */
bit sdm = 1, ddm = 1;  /* daemon lives */
bit svm = 1, dvm = 0;  /* snvmm lives */
mtype sphase = pIDLE;
mtype dphase = qPREP;
bit srun = 1;          /* vCPUs run at the source, effects free */
bit drun = 0;          /* vCPUs run at the destination */
bit drel = 0;          /* ... and their effects are let out */
bit sconn = 0, dconn = 0; /* each side's opinion of the connection */
bit connup = 0, linkup = 1;
bit dhigher = 0;       /* destination saw a higher epoch: paused, in doubt */
/* post-copy: the source's snvmm has pages to hand out; the destination's guest lacks some. Which, and how they travel, is not modelled:
 * they come in any one step at which both live and the link is whole */
bit spages = 0, dpages = 0;

chan s2d = [3] of { mtype, byte };
chan d2s = [3] of { mtype, byte };
/* asked, record state, epoch, live and started / attempt still open */
chan rep_sd = [1] of { bit, mtype, byte, bit };
chan rep_ds = [1] of { bit, mtype, byte, bit };

/* ---- ghosts and budgets */
bit s_has = 1, d_has = 0;
#ifdef SEE_TAKEN_BACK_AFTER_COMMIT
bit tookback = 0;
#endif
#ifdef SEE_PAGES_LOST
bit lost = 0;
#endif
byte attempts = 0, crashes = 0, cuts = 0, forces = 0;

#define D_OWNS (drec == rOWNERU || drec == rOWNER)
#ifdef MUT_NO_COMPARE
#define D_MUTE 0
#else
#define D_MUTE (dvm && (dphase == qHELD || dphase == qFAILED)) /* answers nothing: an owner write is in flight, or failed */
#endif
/* what D reports as `started`: the VM was let out, and has all of its memory */
#ifdef COLD /* a VM that is stopped: nothing to start, no memory, and no process waits for the other side */
#define D_STARTED D_OWNS
#elif defined(MUT_STARTED_WITHOUT_PAGES)
#define D_STARTED (dvm && drel)
#else
#define D_STARTED (dvm && drel && !dpages)
#endif
#ifdef MUT_IGNORE_EPOCH
#define IGNORE_EPOCH 1
#else
#define IGNORE_EPOCH 0
#endif
#define S_OPEN (svm && (sphase == pNEW || sphase == pCOPY || sphase == pHAND || sphase == pPAUSED))

inline check() {
	/* never two running copies with effects */
	assert(!(srun && drel));
	assert(!drel || (drun && dvm));
	/* no effect lost: whoever lets effects out has all the earlier ones */
	assert(!srun || (s_has && svm));
	assert(!drel || d_has);
	/* an effect at the destination implies that its ownership is durable */
	assert(!drel || D_OWNS);
	/* at most one believes that it owns the VM; after --run-here the higher epoch tells which */
	assert(!(srec == rOWNER && D_OWNS) || (forces > 0 && sepoch != depoch));
	/* and always somebody can still prove it */
	assert(srec == rOWNER || srec == rHANDING || D_OWNS);
	/* files go at the source only behind `moved` here and ownership there */
	assert(sfiles == 2 || ((srec == rMOVED || srec == rNONE) && D_OWNS));
	/* ... and of its memory */
	assert(!dpages || sfiles == 2);
	/* memory in post-copy is lost with a process or a host, or by a person's word: not with the link */
	assert(!(drel && dpages && !spages) || crashes > 0 || forces > 0);
	/* the owner's files are there */
	assert(!D_OWNS || dfiles);
	/* whoever has to ask finds a record to answer from */
	assert(srec != rHANDING || drec != rNONE)
	/* SEE_*: must be found *violated*; they prove that the search gets to the places that matter */
#ifdef SEE_MOVED_AFTER_ABORT
	; assert(!(srec == rNONE && drec == rOWNER && depoch == 2 && crashes == 0 && cuts == 0))
#endif
#ifdef SEE_TAKEN_BACK_AFTER_COMMIT
	; assert(!(tookback && srun && forces == 0))
#endif
#ifdef SEE_CRASHED_OWNER_FILES_KEPT
	; assert(!(srec == rMOVED && !speerstarted && sfiles == 2 && drec == rOWNERU && !dvm && sdm && ddm))
#endif
#ifdef SEE_PAGES_AFTER_MOVED
	; assert(!(srec == rMOVED && svm && spages && dpages && drel && drec == rOWNER && cuts > 0))
#endif
#ifdef SEE_PAGES_LOST
	; assert(!(lost && drel && srec == rNONE))
#endif
#ifdef SEE_RUN_HERE_BEATS_OLD_OWNER
	; assert(!(srun && sunconf && dhigher))
#endif
#ifdef SEE_RUN_HERE_AT_DESTINATION
	; assert(!(forces == 1 && drel && drec == rOWNER && depoch > sepoch && srec == rMOVED))
#endif
#ifdef SEE_TWO_WAITING
	; assert(!(srec == rHANDING && svm && sphase == pDOUBT && drec == rOWNERU && drel && dphase == qTOLD && !dconn))
#endif
}

inline s_goes_on() { /* vCPUs run again at the source: what was captured is stale */
	srun = 1; d_has = 0; sphase = pIDLE; sconn = 0; connup = 0; spages = 0
}

inline s_crash() { svm = 0; srun = 0; sphase = pIDLE; sconn = 0; connup = 0; spages = 0 }
inline d_crash() { dvm = 0; drun = 0; drel = 0; dphase = qPREP; dconn = 0; connup = 0; dhigher = 0; dpages = 0 }
inline d_release() { drun = 1; drel = 1; s_has = 0 }

inline send_s(m) { if :: connup -> s2d!m, sepoch :: else -> skip fi }
inline send_d(m) { if :: connup -> d2s!m, depoch :: else -> skip fi }
inline flush(q) { do :: len(q) > 0 -> q?_, _ :: else -> break od }

/* ------------------------------------------------------------------ source */
active proctype source() {
	bit asked, x; mtype r; byte e;
end:
	do
	/* a new attempt: its epoch is durable before anybody hears it */
	:: atomic { svm && srun && sdm && sphase == pIDLE && srec == rOWNER && !sunconf && attempts < ATTEMPTS ->
		attempts++; sepoch++; sphase = pNEW; check() }
	/* hello .. prepared: the destination's daemon makes the record and starts the snvmm */
	:: atomic { svm && sphase == pNEW && linkup && ddm &&
		(drec == rNONE || ((drec == rPREPARED && (!dvm || dphase == qPREP || dphase == qREADY) || drec == rABANDONED) &&
			depoch < sepoch)) ->
		drec = rPREPARED; depoch = sepoch; dfiles = 1; dvm = 1; dphase = qPREP; drun = 0; dhigher = 0; dpages = 0;
		flush(s2d); flush(d2s); connup = 1; sconn = 1; dconn = 1; sphase = pCOPY; check() }
	:: atomic { svm && sphase == pCOPY && sconn -> srec = rHANDING; sphase = pHAND; check() }
	:: atomic { svm && sphase == pHAND && sconn -> srun = 0; d_has = 1; sphase = pPAUSED;
#ifndef COLD
		if :: spages = 1 :: skip fi;
#endif
		send_s(mSTATE); check() }
	:: atomic { svm && sphase == pPAUSED && sconn && len(d2s) > 0 -> d2s?r, e;
		if :: r == mREADY && e == sepoch -> send_s(mCOMMIT); sphase = pSENT :: else -> skip fi; check() }
	/* abort for any reason while COMMIT has not been sent: no promise is needed */
	:: atomic { S_OPEN -> srec = rOWNER; s_goes_on(); check() }
	:: atomic { svm && sphase == pSENT && sconn && len(d2s) > 0 -> d2s?r, e;
		if
		:: r == mRUNNING && e == sepoch ->
#ifdef MUT_DELETE_EARLY
			sfiles = 1;
			check();
#endif
#ifdef MUT_STARTED_WITHOUT_PAGES
			speerstarted = 1;
#else
			speerstarted = !spages;
#endif
			srec = rMOVED; sphase = pDONE; send_s(mMOVED)
		:: else -> skip
		fi; check() }
	:: atomic { svm && sphase == pDONE && sconn && len(d2s) > 0 -> d2s?r, e;
		if :: r == mACK && e == sepoch -> speeracked = 1 :: else -> skip fi; check() }
	/* it hears that the last page has come, on a session of the pages or by asking */
	:: atomic { svm && spages && linkup && D_STARTED -> spages = 0;
		if :: srec == rMOVED -> speerstarted = 1 :: else -> skip fi; check() }
	/* ... or that nobody wants one any more */
	:: atomic { svm && sphase == pDONE && spages && linkup && ddm && !dvm -> s_crash(); check() }
#ifdef MUT_LEAVE_WITH_PAGES
	:: atomic { svm && sphase == pDONE && spages -> s_crash(); check() }
#endif
	:: atomic { svm && sphase == pDONE && !spages -> svm = 0; sphase = pIDLE; sconn = 0; connup = 0; check() }
	/* the connection is seen to be dead */
	:: atomic { svm && sconn && !connup -> sconn = 0; flush(d2s); check() }
	:: atomic { svm && sphase == pSENT && !sconn -> sphase = pDOUBT; check() }
#ifdef COLD
	:: atomic { svm && sphase == pDOUBT -> s_crash(); check() }
#endif
#ifdef MUT_RESUME_ON_TIMEOUT
	:: atomic { svm && sphase == pDOUBT -> srec = rOWNER; s_goes_on(); check() }
#endif
#ifdef MUT_SOURCE_STARTS_HANDING
	:: atomic { sdm && !svm && srec == rHANDING -> srec = rOWNER; svm = 1; s_goes_on(); check() }
#endif

	/* asking: the snvmm itself while paused, the daemon when the snvmm is dead */
	:: atomic { (svm && sphase == pDOUBT || sdm && !svm && srec == rHANDING) && linkup && ddm &&
		len(rep_sd) == 0 && len(rep_ds) == 0 && !D_MUTE &&
		drec != rNONE -> rep_sd!1, srec, sepoch, 0; check() }
	/* a tombstone, or an owner by --run-here, looks for its acknowledgement */
	:: atomic { sdm && !svm && srec == rMOVED && (!speeracked && D_OWNS || !speerstarted && D_STARTED) &&
		linkup && ddm && len(rep_sd) == 0 && len(rep_ds) == 0 -> rep_sd!1, srec, sepoch, 0; check() }
	:: atomic { sdm && srec == rOWNER && sunconf && (drec == rABANDONED || drec == rNONE || drec == rPREPARED || drec == rOWNERU && !dhigher) &&
		linkup && ddm && len(rep_sd) == 0 && len(rep_ds) == 0 -> rep_sd!1, srec, sepoch, 0; check() }

	/* a report about the peer, as an ANSWER to ours or with an ASK of its own (which needs our daemon's port) */
	:: atomic { (svm || sdm) && linkup && len(rep_ds) > 0 && (sdm || rep_ds?[0, _, _, _]) -> rep_ds?asked, r, e, x;
		if
		:: srec == rHANDING && S_OPEN && r == rABANDONED && e == sepoch -> srec = rOWNER; s_goes_on()
		:: srec == rHANDING && !S_OPEN && r == rABANDONED && (e == sepoch || IGNORE_EPOCH) -> srec = rOWNER;
#ifdef SEE_TAKEN_BACK_AFTER_COMMIT
			tookback = svm;
#endif
			if :: svm -> s_goes_on() :: else -> skip fi
		:: srec == rHANDING && !S_OPEN && (r == rOWNERU || r == rOWNER) && e >= sepoch ->
			srec = rMOVED; speerstarted = x;
			if :: svm && spages -> sphase = pDONE
			:: svm && !spages -> svm = 0; sphase = pIDLE; sconn = 0; connup = 0
			:: else -> skip fi
		:: srec == rMOVED && (r == rOWNERU || r == rOWNER) && e >= sepoch ->
			speerstarted = speerstarted | x; speeracked = speeracked | (r == rOWNER)
		:: srec == rOWNER && S_OPEN && r == rABANDONED && e == sepoch -> s_goes_on()
		:: srec == rOWNER && sunconf && (r == rABANDONED && e <= sepoch || r == rNONE) -> sunconf = 0
		:: else -> skip
		fi;
		if :: asked && len(rep_sd) == 0 -> rep_sd!0, srec, sepoch, (S_OPEN && srec == rOWNER) :: else -> skip fi;
		asked = 0; r = 0; e = 0; x = 0; check() }

	/* the daemon: deletion in idempotent steps, then the tombstone */
	:: atomic { sdm && !svm && srec == rMOVED && speerstarted && sfiles > 0 -> sfiles--; check() }
#ifdef MUT_FORGET_MOVED
	:: atomic { sdm && !svm && srec == rMOVED && sfiles == 0 -> srec = rNONE; check() }
#else
	:: atomic { sdm && !svm && srec == rMOVED && sfiles == 0 && speeracked -> srec = rNONE; check() }
#endif
	/* snvm start of a crashed VM */
	:: atomic { sdm && !svm && srec == rOWNER && !sunconf -> svm = 1; s_goes_on(); check() }
	/* resolve --run-here: a person says that the destination's host has no power */
	:: atomic { forces < FORCES && !dup && sdm && srec == rHANDING && (!svm || sphase == pDOUBT || sphase == pSENT) ->
		forces++; srec = rOWNER; sepoch++; sunconf = 1; s_has = 1; svm = 1; s_goes_on(); check() }
	od
}

/* ------------------------------------------------------------- destination */
active proctype destination() {
	bit asked, x; mtype r; byte e;
end:
	do
	:: atomic { dvm && dconn && dphase == qPREP && len(s2d) > 0 -> s2d?r, e;
		if :: r == mSTATE && e == depoch && drec == rPREPARED -> dphase = qREADY; dpages = spages; send_d(mREADY) :: else -> skip fi;
		r = 0; e = 0; check() }
	/* COMMIT: the guest runs at once, nothing it does gets out */
	:: atomic { dvm && dconn && dphase == qREADY && len(s2d) > 0 -> s2d?r, e;
		if :: r == mCOMMIT && e == depoch && drec == rPREPARED -> dphase = qHELD; drun = 1 :: else -> skip fi;
		r = 0; e = 0; check() }
#ifdef MUT_RELEASE_EARLY
	:: atomic { dvm && dphase == qHELD && !drel -> d_release(); check() }
#endif
	/* prepared -> owner, unconfirmed */
	:: atomic { dvm && dphase == qHELD && drec == rPREPARED -> drec = rOWNERU; dphase = qOWNER; check() }
#ifdef MUT_NO_COMPARE
	:: atomic { dvm && dphase == qHELD && drec == rABANDONED -> drec = rOWNERU; dphase = qOWNER; check() }
#endif
	/* ... the write fails, and nobody knows what the medium holds: stop, promise nothing */
	:: atomic { dvm && dphase == qHELD && crashes < CRASHES && drec == rPREPARED ->
		crashes++; drun = 0; drel = 0; dphase = qFAILED; if :: drec = rOWNERU :: skip fi; check() }
	/* resolve --give-up there: the snvmm is ended, the record decides */
	:: atomic { dvm && dphase == qFAILED && ddm -> d_crash(); check() }
	:: atomic { dvm && dphase == qOWNER -> d_release(); dphase = qRELEASED; check() }
	:: atomic { dvm && dphase == qRELEASED -> send_d(mRUNNING); dphase = qTOLD; check() }
	:: atomic { dvm && dconn && dphase == qTOLD && len(s2d) > 0 -> s2d?r, e;
		if :: r == mMOVED && e == depoch && drec == rOWNERU -> drec = rOWNER; send_d(mACK) :: else -> skip fi;
		r = 0; e = 0; check() }
#ifdef COLD
	:: atomic { dvm && dphase == qTOLD && !dconn && drec == rOWNERU -> d_crash(); check() }
#endif
	/* the last page has come */
	:: atomic { dvm && dpages && spages && linkup && dphase == qTOLD -> dpages = 0; check() }
	/* the other side has none: what waits for one never runs again, and with it the process ends */
	:: atomic { dvm && dpages && !spages && linkup && sdm && dphase == qTOLD -> d_crash();
#ifdef SEE_PAGES_LOST
		lost = 1;
#endif
		check() }
	/* the connection is seen to be dead */
	:: atomic { dvm && dconn && !connup -> dconn = 0; flush(s2d); check() }
	:: atomic { dvm && !dconn && drec == rPREPARED && (dphase == qPREP || dphase == qREADY) ->
		drec = rABANDONED; d_crash(); check() }

	/* the daemon finds a record whose snvmm is dead */
	:: atomic { ddm && !dvm && drec == rPREPARED -> drec = rABANDONED; check() }
	:: atomic { ddm && !dvm && drec == rABANDONED && dfiles -> dfiles = 0; check() }
#ifdef MUT_FORGET_ABANDONED
	:: atomic { ddm && !dvm && drec == rABANDONED && !dfiles -> drec = rNONE; check() }
#endif
	/* asking: unconfirmed, or abandoned and wanting to be forgotten */
	:: atomic { (dvm && drec == rOWNERU && !dconn && !dhigher && dphase == qTOLD || ddm && !dvm && drec == rOWNERU && !dhigher ||
			ddm && !dvm && drec == rABANDONED && !dfiles) &&
		linkup && sdm && srec != rNONE && len(rep_sd) == 0 && len(rep_ds) == 0 -> rep_ds!1, drec, depoch, D_STARTED; check() }

	/* a report about the peer; while an owner write is in flight, or failed, it waits */
	:: atomic { (dvm || ddm) && linkup && len(rep_sd) > 0 && (ddm || rep_sd?[0, _, _, _]) && !D_MUTE -> rep_sd?asked, r, e, x;
		if
		:: drec == rPREPARED && asked && e >= depoch ->
#ifdef MUT_ABANDON_VOLATILE
			rep_ds!0, rABANDONED, depoch, 0; asked = 0
#else
			drec = rABANDONED;
#ifdef MUT_NO_COMPARE
			if :: dvm && dphase == qHELD -> skip :: else -> d_crash() fi
#else
			d_crash()
#endif
#endif
		:: drec == rOWNERU && r == rMOVED && e <= depoch -> drec = rOWNER
		:: drec == rOWNERU && r == rOWNER && e > depoch -> drun = 0; drel = 0; dhigher = 1
		:: drec == rABANDONED && !dfiles && !dvm && (r == rOWNER && !x && e == depoch || e > depoch) -> drec = rNONE
		:: else -> skip
		fi;
		if :: asked && len(rep_ds) == 0 -> rep_ds!0, drec, depoch, D_STARTED :: else -> skip fi;
		asked = 0; r = 0; e = 0; x = 0; check() }

	/* resolve --give-up of an unconfirmed owner that was shown a higher epoch */
	:: atomic { ddm && dhigher && drec == rOWNERU -> drec = rABANDONED; d_crash(); check() }
	/* snvm start of a crashed VM */
	:: atomic { ddm && !dvm && drec == rOWNER -> dvm = 1; dphase = qTOLD; d_release(); check() }
#ifdef MUT_START_UNCONFIRMED
	:: atomic { ddm && !dvm && drec == rOWNERU -> dvm = 1; dphase = qTOLD; d_release(); check() }
#endif
	/* resolve --run-here: a person says that the source's host has no power */
	:: atomic { forces < FORCES && !sup && ddm && drec == rOWNERU && !dhigher && (!dvm || dphase == qTOLD) ->
		forces++; depoch++; dvm = 1; dphase = qTOLD; dconn = 0; d_release(); check() }
	od
}

/* ------------------------------------------------------ faults and repairs */
active proctype world() {
end:
	do
	:: atomic { crashes < CRASHES && svm -> crashes++; s_crash(); check() }
	:: atomic { crashes < CRASHES && dvm -> crashes++; d_crash(); check() }
	:: atomic { crashes < CRASHES && sdm -> crashes++; sdm = 0; check() }
	:: atomic { crashes < CRASHES && ddm -> crashes++; ddm = 0; check() }
	:: atomic { crashes < CRASHES && sup -> crashes++; s_crash(); sdm = 0; sup = 0; check() }
	:: atomic { crashes < CRASHES && dup -> crashes++; d_crash(); ddm = 0; dup = 0; check() }
	:: atomic { cuts < CUTS && linkup -> cuts++; linkup = 0; connup = 0; check() }
	:: atomic { cuts < CUTS && connup -> cuts++; connup = 0; check() }
	:: atomic { !linkup && len(rep_sd) > 0 -> rep_sd?_, _, _, _ }
	:: atomic { !linkup && len(rep_ds) > 0 -> rep_ds?_, _, _, _ }
	/* an answer whose asker died */
	:: atomic { !sdm && len(rep_ds) > 0 && (!svm || rep_ds?[1, _, _, _]) -> rep_ds?_, _, _, _ }
	:: atomic { !ddm && len(rep_sd) > 0 && (!dvm || rep_sd?[1, _, _, _]) -> rep_sd?_, _, _, _ }
	/* repairs */
	:: !linkup -> linkup = 1
	:: !sup -> sup = 1
	:: !dup -> dup = 1
	:: sup && !sdm -> sdm = 1
	:: dup && !ddm -> ddm = 1
	od
}

/* Nothing more can happen: all are up, the link is whole. Is the matter settled? */
active proctype settled() {
end:
	timeout ->
	assert((srec == rOWNER && !sunconf && svm && srun && sfiles == 2 && drec == rNONE && !dvm && !dfiles) ||
		(srec == rNONE && !svm && sfiles == 0 && drec == rOWNER && dvm && drel && !dpages))
}
