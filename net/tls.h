/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NET_TLS_H
#define NET_TLS_H

#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <stddef.h>
#include <stdint.h>

/* Private to net/: what is read out of certificates (tls_context.c). */

/* Names are exact, and only DNS alternative names count. */
#define TLS_HOST_FLAGS (X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT)

/* All strings are made printable: an unverified peer chose them. */
void tls_certificate_first_name(X509 *cert, char *buf, size_t size);
/* "host1, host2", or "none". */
void tls_certificate_names(X509 *cert, char *buf, size_t size);
void tls_certificate_fingerprint(X509 *cert, char hex[65]);
/* Seconds since 1970, 0 when the date cannot be read. */
int64_t tls_certificate_not_after(X509 *cert);

#endif
