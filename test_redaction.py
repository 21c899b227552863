"""What redaction promises, for each kind of secret known to travel in bodies, in the disguises it may come in.

A body is written once, with every secret value between << and >>: what is sent is the text without the brackets, what
has to be recorded is the text with the placeholder in their place, and not one byte else may differ.
"""

from __future__ import annotations

import gzip
import json
import mmap
import random
import re
import tempfile
import time
import zlib
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import pytest

import es_proxy
from es_proxy import PLACEHOLDER, redact_body, redact_query, redact_received, redact_userinfo
from mock_es import MockES
from test_es_proxy import pairs, running_proxy

JSON = b"application/json"
NDJSON = b"application/x-ndjson"
WHOLE = b'"' + PLACEHOLDER + b'"'
MARKED = re.compile(rb"<<(.*?)>>", re.DOTALL)


def sent(text: bytes) -> bytes:
    return MARKED.sub(lambda secret: secret[1], text)


def recorded(text: bytes) -> bytes:
    return MARKED.sub(WHOLE, text)


def redacted(
    path: bytes, body: bytes, type_: bytes = JSON, coding: bytes = b"", **options: int
) -> tuple[bytes, int] | None:
    redaction_ = redact_body(path, type_, coding, body, **options)
    if redaction_ is None:
        return None
    assert redaction_.count >= 1
    first = b"".join(redaction_.pieces)
    assert first == b"".join(redaction_.pieces), "pieces can be iterated again"
    return first, redaction_.count


# -- The table: id, path, body as an official client sends it (compact, or pretty as Kibana's console does)

ROWS: list[tuple[str, bytes, bytes]] = [
    (
        "put_user",
        b"/_security/user/jacknich",
        b'{"password":<<"S3CRET-l0ng-r4nd0m-p@ssw0rd">>,"roles":["admin"],"full_name":"Jack","metadata":{"intelligence":7}}',
    ),
    ("put_user_hash", b"/_security/user/jacknich", b'{"password_hash":<<"$2a$10$S3CRET">>,"roles":[],"enabled":true}'),
    ("change_password", b"/_security/user/jacknich/_password", b'{\n  "password" : <<"S3CRET-new">>\n}\n'),
    ("change_own_password", b"/_security/user/_password", b'{"password":<<"S3CRET-new">>}'),
    (
        "get_token",
        b"/_security/oauth2/token",
        b'{"grant_type":"password","username":"test_admin","password":<<"S3CRET">>}',
    ),
    ("get_token_kerberos", b"/_security/oauth2/token", b'{"grant_type":"_kerberos","kerberos_ticket":<<"YIIS3CRET">>}'),
    (
        "refresh_token",
        b"/_security/oauth2/token",
        b'{"grant_type":"refresh_token","refresh_token":<<"S3CRET46ToAwKVDt">>}',
    ),
    (
        "service_token_grant",
        b"/_security/oauth2/token",
        b'{"grant_type":"client_credentials","service_account_token":<<"AAEAAS3CRET">>}',
    ),
    ("invalidate_token", b"/_security/oauth2/token", b'{"token":<<"S3CRETdGhpcyBpcyB">>}'),
    (
        "grant_api_key",
        b"/_security/api_key/grant",
        b'{"grant_type":"password","username":"u","password":<<"S3CRET">>,'
        b'"api_key":{"name":"k","expiration":"1d","role_descriptors":{"r":{"cluster":["all"]}}}}',
    ),
    (
        "grant_api_key_jwt",
        b"/_security/api_key/grant",
        b'{"grant_type":"access_token","access_token":<<"eyJS3CRET.a.b">>,'
        b'"client_authentication":{"scheme":"SharedSecret","value":<<"S3CRET2">>},"api_key":{"name":"k"}}',
    ),
    ("clone_api_key", b"/_security/api_key/clone", b'{"api_key":<<"VuaCfGcBCdbkQm-S3CRET">>,"name":"copy"}'),
    (
        "bulk_grant_api_key",
        b"/_security/api_key/_bulk_grant",
        b'{"grant_type":"password","username":"u","password":<<"S3CRET">>,"api_keys":[{"name":"a"},{"name":"b"}]}',
    ),
    (
        "activate_profile",
        b"/_security/profile/_activate",
        b'{"username":"jacknich","password":<<"S3CRET">>,"grant_type":"password"}',
    ),
    (
        "activate_profile_token",
        b"/_security/profile/_activate",
        b'{"grant_type":"access_token","access_token":<<"S3CRET">>}',
    ),
    (
        "saml_authenticate",
        b"/_security/saml/authenticate",
        b'{"content":<<"PHNhbWxwOlJlc3BvbnNlS3CRET">>,"ids":["4fee3b046395c4e751011e97f8900b5273d56685"],"realm":"saml1"}',
    ),
    ("saml_logout", b"/_security/saml/logout", b'{"token":<<"S3CRET46ToAw">>,"refresh_token":<<"S3CRETmJdtIh">>}'),
    (
        "saml_invalidate",
        b"/_security/saml/invalidate",
        b'{"query_string":<<"SAMLRequest=nZFda4MwFIb_S3CRET">>,"realm":"saml1"}',
    ),
    ("saml_invalidate_7", b"/_security/saml/invalidate", b'{"queryString":<<"SAMLRequest=S3CRET">>,"realm":"saml1"}'),
    (
        "saml_complete_logout",
        b"/_security/saml/complete_logout",
        b'{"realm":"saml1","ids":["_1c36"],"query_string":<<"SAMLResponse=S3CRET">>}',
    ),
    (
        "oidc_authenticate",
        b"/_security/oidc/authenticate",
        b'{"redirect_uri":<<"https://oidc-kibana.elastic.co:5603/api/security/oidc/callback?code=S3CRET&state=4">>,'
        b'"state":"4dbrihtIAt3wBTwo6DxK","nonce":"WaBPH0KqPVdG5HHdSxPRjfoZ","realm":"oidc1"}',
    ),
    ("oidc_logout", b"/_security/oidc/logout", b'{"token":<<"S3CRETdGhp">>,"refresh_token":<<"S3CRETvLBP">>}'),
    ("delegate_pki", b"/_security/delegate_pki", b'{"x509_certificate_chain":<<["MIIDeDCCAmCgS3CRET","MIIDS3CRET"]>>}'),
    (
        "put_named_credentials",
        b"/_security/named_credentials/mine",
        b'{"type":"http","auth":<<{"basic":{"username":"u","password":"S3CRET"}}>>,"description":"d"}',
    ),
    ("reload_secure_settings", b"/_nodes/reload_secure_settings", b'{"secure_settings_password":<<"S3CRET">>}'),
    (
        "reload_secure_settings_node",
        b"/_nodes/nodeId1,nodeId2/reload_secure_settings",
        b'{"secure_settings_password":<<"S3CRET">>}',
    ),
    (
        "reindex_remote",
        b"/_reindex",
        b'{"source":{"remote":{"host":"http://otherhost:9200","username":"user","password":<<"S3CRET">>,'
        b'"headers":{"X-Hero":<<"S3CRET-h">>,"Authorization":<<"ApiKey S3CRET">>}},"index":"src","size":10,'
        b'"query":{"match":{"test":"data"}}},"dest":{"index":"dst"}}',
    ),
    (
        "reindex_remote_key",
        b"/_reindex",
        b'{"source":{"remote":{"host":"https://o:9200","api_key":<<"S3CRET">>},"index":"s"},"dest":{"index":"d"}}',
    ),
    (
        "put_watch",
        b"/_watcher/watch/my-watch",
        b'{"trigger":{"schedule":{"cron":"0 0/1 * * * ?"}},"input":{"http":{"request":{"host":"h","port":80,"path":"/",'
        b'"auth":{"basic":{"username":"u","password":<<"S3CRET">>}},"headers":{"X-Api":<<"S3CRET-h">>},'
        b'"params":{"api_key":<<"S3CRET-p">>}}}},"condition":{"script":{"source":"return true","params":{"limit":5}}},'
        b'"actions":{"hook":{"webhook":{"method":"POST","host":"h","auth":{"basic":{"username":"u","password":<<"S3CRET-w">>}},'
        b'"headers":{"Authorization":<<"Bearer S3CRET">>},"params":{"k":<<17>>},"body":"{{ctx.watch_id}}"}}}}',
    ),
    (
        "execute_watch",
        b"/_watcher/watch/_execute",
        b'{"trigger_data":{"triggered_time":"now"},"watch":{"trigger":{"schedule":{"interval":"10s"}},"input":{"http":'
        b'{"request":{"url":"http://h/","auth":{"basic":{"username":"u","password":<<"S3CRET">>}},'
        b'"headers":{"X":<<"S3CRET-h">>}}}}}}',
    ),
    (
        "execute_watch_by_id",
        b"/_watcher/watch/my-watch/_execute",
        b'{"alternative_input":{"http":{"request":{"params":{"k":<<"S3CRET">>}}}},"action_modes":{"a":"simulate"}}',
    ),
    (
        "put_inference",
        b"/_inference/sparse_embedding/my-endpoint",
        b'{"service":"cohere","service_settings":{"api_key":<<"S3CRET">>,"model_id":"embed"},"task_settings":{"truncate":"END"}}',
    ),
    (
        "put_inference_no_task",
        b"/_inference/my-endpoint",
        b'{"service":"openai","service_settings":{"api_key":<<"S3CRET">>,"organization_id":"o"}}',
    ),
    (
        "put_inference_bedrock",
        b"/_inference/completion/b",
        b'{"service":"amazonbedrock","service_settings":{"access_key":<<"S3CRET1">>,"secret_key":<<"S3CRET2">>,"region":"us"}}',
    ),
    (
        "put_inference_vertex",
        b"/_inference/rerank/v",
        b'{"service":"googlevertexai","service_settings":{"service_account_json":<<"{\\"private_key\\":\\"S3CRET\\\\n\\"}">>}}',
    ),
    (
        "put_inference_azure",
        b"/_inference/completion/z",
        b'{"service":"azureopenai","service_settings":{"entra_id":<<"S3CRET">>,"client_secret":<<"S3CRET2">>,"deployment_id":"d"}}',
    ),
    (
        "update_inference_custom",
        b"/_inference/text_embedding/c/_update",
        b'{"service_settings":{"secret_parameters":{"api_key":<<"S3CRET">>},"url":"https://h/"}}',
    ),
    (
        "create_repository_s3",
        b"/_snapshot/my_repo",
        b'{"type":"s3","settings":{"bucket":"b","access_key":<<"AKIAS3CRET">>,"secret_key":<<"S3CRET">>}}',
    ),
    (
        "put_data_source",
        b"/_query/data_source/lake",
        b'{"type":"s3","settings":{"region":"us-east-1","access_key":<<"AKIAS3CRET">>,"secret_key":<<"S3CRET">>}}',
    ),
    (
        "put_data_source_azure",
        b"/_query/data_source/lake",
        b'{"type":"azure","settings":{"account":"a","sas_token":<<"sv=S3CRET">>,"key":<<"S3CRET">>,'
        b'"connection_string":<<"AccountKey=S3CRET">>}}',
    ),
    ("fleet_secret", b"/_fleet/secret", b'{"value":<<"S3CRET">>}'),
    ("connector_secret_post", b"/_connector/_secret", b'{"value":<<"S3CRET">>}'),
    ("connector_secret_put", b"/_connector/_secret/id1", b'{"value":<<"S3CRET">>}'),
    (
        "connector_configuration_values",
        b"/_connector/my-spo/_configuration",
        b'{"values":{"tenant_id":<<"S3CRET-t">>,"secret_value":<<"S3CRET">>,"port":<<5432>>,"ssl":false}}',
    ),
    (
        "connector_configuration",
        b"/_connector/my-spo/_configuration",
        b'{"configuration":{"password":{"default_value":null,"label":"Password","order":1,"sensitive":true,'
        b'"value":<<"S3CRET">>}}}',
    ),
    (
        "cluster_settings",
        b"/_cluster/settings",
        b'{"persistent":{"indices.recovery.max_bytes_per_sec":"50mb","xpack.notification.email.account.work.smtp.password":'
        b'<<"S3CRET">>},"transient":{"x":{"slack":{"secure_token":<<"S3CRET">>,"url":null}},"a.client_secret":<<"S3CRET">>}}',
    ),
    (
        "put_license",
        b"/_license",
        b'{"licenses":[{"uid":"893361dc","type":"platinum","max_nodes":5,"issued_to":"u","signature":<<"AAAAS3CRET">>}]}',
    ),
    (
        "os_internalusers_put",
        b"/_plugins/_security/api/internalusers/kirk",
        b'{"password":<<"S3CRET">>,"opendistro_security_roles":["r"],"backend_roles":["c"],"attributes":{"a":"v"}}',
    ),
    (
        "os_internalusers_hash",
        b"/_plugins/_security/api/internalusers/kirk",
        b'{"hash":<<"$2y$12$S3CRET">>,"backend_roles":[]}',
    ),
    (
        "os_internalusers_patch",
        b"/_plugins/_security/api/internalusers",
        b'[{"op":"add","path":"/spock","value":<<{"password":"S3CRET","backend_roles":["c"]}>>},{"op":"remove","path":"/worf"}]',
    ),
    (
        "os_internalusers_patch_one",
        b"/_plugins/_security/api/internalusers/kirk",
        b'[ { "op": "replace", "path": "/password", "value": <<"S3CRET">> } ]',
    ),
    ("os_user_put", b"/_plugins/_security/api/user/kirk", b'{"password":<<"S3CRET">>}'),
    ("os_account", b"/_plugins/_security/api/account", b'{"current_password":<<"S3CRET">>,"password":<<"S3CRET2">>}'),
    (
        "os_securityconfig",
        b"/_plugins/_security/api/securityconfig/config",
        b'{"dynamic":{"authc":{"jwt":{"http_authenticator":{"type":"jwt","config":{"signing_key":<<"S3CRET">>,"roles_key":"r"}}},'
        b'"saml":{"http_authenticator":{"config":{"exchange_key":<<"S3CRET">>,"idp":{"entity_id":"e"}}}},'
        b'"oidc":{"http_authenticator":{"config":{"client_secret":<<"S3CRET">>}}},'
        b'"ldap":{"authentication_backend":{"config":{"bind_dn":"cn","password":<<"S3CRET">>,"pemkey_password":<<"S3CRET">>}}}},'
        b'"on_behalf_of":{"enabled":true,"signing_key":<<"S3CRET">>,"encryption_key":<<"S3CRET">>}}}',
    ),
    (
        "os_securityconfig_patch",
        b"/_plugins/_security/api/securityconfig",
        b'[{"op":"replace","path":"/config/dynamic/on_behalf_of/signing_key","value":<<"S3CRET">>},'
        b'{"op":"add","path":"/config/dynamic/on_behalf_of","value":{"enabled":true,"encryption_key":<<"S3CRET">>}}]',
    ),
    (
        "os_ml_connector",
        b"/_plugins/_ml/connectors/_create",
        b'{"name":"OpenAI","version":"1","protocol":"http","parameters":{"model":"gpt"},"credential":<<{"openAI_key":"S3CRET"}>>,'
        b'"actions":[{"action_type":"predict","headers":{"Authorization":<<"Bearer S3CRET">>},"url":"https://api/v1"}]}',
    ),
    (
        "os_ml_model",
        b"/_plugins/_ml/models/_register",
        b'{"name":"m","function_name":"remote","connector":{"credential":<<{"access_key":"S3CRET"}>>}}',
    ),
    (
        "os_datasource",
        b"/_plugins/_query/_datasources",
        b'{"name":"my_prometheus","connector":"prometheus","properties":{"prometheus.uri":"http://h:9090",'
        b'"prometheus.auth.type":"basicauth","prometheus.auth.username":"u","prometheus.auth.password":<<"S3CRET">>}}',
    ),
    (
        "os_datasource_sigv4",
        b"/_plugins/_query/_datasources",
        b'{"properties":{"prometheus.auth.access_key":<<"S3CRET">>,"prometheus.auth.secret_key":<<"S3CRET">>}}',
    ),
]

FLAT: list[tuple[str, bytes, bytes]] = [
    ("reindex", b"/_reindex", b'{"source.remote.password":<<"S3CRET">>,"source":{"index":"i"}}'),
    (
        "reindex_half",
        b"/_reindex",
        b'{"source.remote":{"password":<<"S3CRET">>,"headers.X-Y.Z":<<"S3CRET">>,"host":"h"}}',
    ),
    ("reindex_headers", b"/_reindex", b'{"source":{"remote.headers":{"a.b":<<"S3CRET">>,"":<<"S3CRET">>}}}'),
    ("reindex_headers_no_object", b"/_reindex", b'{"source":{"remote":{"headers":<<"X: S3CRET">>}}}'),
    ("reindex_headers_array", b"/_reindex", b'{"source":{"remote":{"headers":[<<"X: S3CRET">>,{"a":<<"S3CRET">>}]}}}'),
    (
        "grant",
        b"/_security/api_key/grant",
        b'{"client_authentication.value":<<"S3CRET">>,"client_authentication.scheme":"s"}',
    ),
    (
        "watch",
        b"/_watcher/watch/w",
        b'{"input.http.request.auth.basic.password":<<"S3CRET">>,"input.http.request.headers.X":<<"S3CRET">>}',
    ),
    (
        "inference",
        b"/_inference/x",
        b'{"service_settings.api_key":<<"S3CRET">>,"service_settings.secret_parameters.k":<<"S3CRET">>}',
    ),
    (
        "snapshot",
        b"/_snapshot/r",
        b'{"settings.access_key":<<"S3CRET">>,"settings":{"client.secret_key":<<"S3CRET">>}}',
    ),
    ("connector", b"/_connector/c/_configuration", b'{"configuration.pw.value":<<"S3CRET">>,"values.pw":<<"S3CRET">>}'),
    ("settings", b"/_cluster/settings", b'{"persistent":{"cluster":{"remote":{"password":<<{"a":"S3CRET"}>>}}}}'),
    (
        "datasource_nested",
        b"/_plugins/_query/_datasources",
        b'{"properties":{"prometheus":{"auth":{"password":<<"S3CRET">>,"type":"basicauth"}}}}',
    ),
    ("in_arrays", b"/_security/user/u", b'{"a":[[{"password":<<"S3CRET">>}]],"b":{"c":{"password":<<"S3CRET">>}}}'),
    ("twice", b"/_security/user/u", b'{"password":<<"S3CRET">>,"roles":[],"password":<<"S3CRET2">>}'),
    (
        "types",
        b"/_security/user/u",
        b'{"a":{"password":<<17>>},"b":{"password":<<-1.5e3>>},"c":{"password":<<["S3CRET",1]>>},'
        b'"d":{"password":<<{"x":{"y":["S3CRET"]}}>>},"e":{"password":null},"f":{"password":true}}',
    ),
    ("case", b"/_security/user/u", b'{"Password":<<"S3CRET">>,"passwordHash":<<"S3CRET">>}'),
    ("white_space", b"/_security/user/u", b'\r\n\t { "x" :1.50, "password"\n:\t<<"S3CRET">> ,"y":[ 1 , 2.0e+1 ]}\r\n '),
    (
        "watch_by_execute",
        b"/_watcher/watch/_execute",
        b'{"watch":{"condition":{"script":{"params":{"a":<<"S3CRET">>}}},'
        b'"transform":{"x":{"headers":{"y":<<"S3CRET">>}}}}}',
    ),
    ("profile_jwt", b"/_security/profile/_activate", b'{"client_authentication":{"scheme":"x","value":<<"S3CRET">>}}'),
    (
        "dataset",
        b"/_query/dataset/d",
        b'{"settings":{"credentials":<<{"a":"S3CRET"}>>,"client_secret_id":<<"S3CRET">>,'
        b'"db_password_hash":<<"S3CRET">>}}',
    ),
    (
        "securityconfig",
        b"/_plugins/_security/api/securityconfig/config",
        b'{"pemkey_content":<<"S3CRET">>,"sp.signature_private_key":<<"S3CRET">>}',
    ),
    ("clone_array", b"/_security/api_key/clone", b'{"api_key":[<<"S3CRET">>]}'),
]

ALL = pytest.mark.parametrize(("path", "text"), [pytest.param(*row[1:], id=row[0]) for row in ROWS + FLAT])


@ALL
@pytest.mark.parametrize(
    "type_", [JSON, b"", b"application/vnd.elasticsearch+json; compatible-with=8", b"application/json; charset=UTF-8"]
)
def test_only_the_secret_values_are_replaced(path: bytes, text: bytes, type_: bytes) -> None:
    assert redacted(path, sent(text), type_) == (recorded(text), len(MARKED.findall(text)))


@ALL
def test_compressed(path: bytes, text: bytes) -> None:
    body, expected = sent(text), (recorded(text), len(MARKED.findall(text)))
    raw = zlib.compressobj(wbits=-15)
    for coding, packed in (
        (b"gzip", gzip.compress(body)),
        (b" GZip\t", gzip.compress(body[:9]) + gzip.compress(body[9:])),
        (b"x-gzip", gzip.compress(body)),
        (b"deflate", zlib.compress(body)),
        (b"deflate", raw.compress(body) + raw.flush()),
        (b"identity", body),
        (b"made-up", body),  # Elasticsearch ignores what it does not know
    ):
        assert redacted(path, packed, JSON, coding) == expected


@ALL
def test_escaped_keys(path: bytes, text: bytes) -> None:
    escaped = re.sub(rb'"(\w)(\w*)"(?=\s*:)', lambda key: b'"\\u00%02X%b"' % (key[1][0], key[2]), text)
    assert escaped != text or b"." in text or b'""' in text
    assert redacted(path, sent(escaped)) == (recorded(escaped), len(MARKED.findall(text)))


@ALL
def test_what_can_not_be_parsed_is_replaced_whole(path: bytes, text: bytes) -> None:
    body = sent(text)
    first_key = re.sub(rb"^(\s*)([{\[])", rb"\1\2/* */", body)
    for unreadable in (
        first_key,
        b"// x\n" + body,
        body + b"//",
        body + b"\n" + body,
        body.rstrip()[:-1],
        body.rstrip()[:-1] + b",]"[:1] + body.rstrip()[-1:],
        b"\xef\xbb\xbf" + body,
        body.decode().encode("utf-16"),
        body.decode().encode("utf-16-be"),
        body.decode().encode("utf-32"),
        body.replace(b'"', b"'"),
        b"---\npassword: S3CRET\nvalue: S3CRET\n",
        b":)\n\x04\xfa\x87password\x45S3CRET\xfb",
        b"\xbf\x68password\x66S3CRET\xff",
        json.dumps(body.decode()).encode(),
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"a":NaN,"password":"S3CRET"}',
        b'{"a":-Infinity,"password":"S3CRET"}',
        b'{"a":01,"password":"S3CRET"}',
        b'{"a":+1,"password":"S3CRET"}',
        b'{"a":.5,"password":"S3CRET"}',
        b'{password:"S3CRET"}',
        b'{"a":"\xff","password":"S3CRET"}',
        b'{"a":"\n","password":"S3CRET"}',
        b'{"a" "b","password":"S3CRET"}',
        b'{,"password":"S3CRET"}',
        b'{"%b":"S3CRET"}' % (b"a" * 3000),
        b"S3CRET",
    ):
        assert redacted(path, unreadable) == (WHOLE, 1), unreadable[:80]
    for coding, broken in (
        (b"gzip", body),
        (b"gzip", gzip.compress(body)[:-9]),
        (b"gzip", gzip.compress(body) + b"junk"),
        (b"br", b"\x0b\x02\x80S3CRET"),
        (b"snappy", b"\xff\x06\x00\x00sNaPpY S3CRET"),
        (b"gzip, gzip", gzip.compress(gzip.compress(body))),
    ):
        assert redacted(path, broken, JSON, coding) == (WHOLE, 1)


def test_big_numbers_are_read() -> None:
    text = b'{"n":%b,"password":<<%b>>,"e":1e999}' % (b"9" * 10_000, b"7" * 10_000)
    assert redacted(b"/_security/user/u", sent(text)) == (recorded(text), 2 - 1)


def test_size_limits() -> None:
    body = b'{"password":"S3CRET","x":"%b"}' % (b"x" * 1000)
    assert redacted(b"/_security/user/u", body, max_parse_bytes=500) == (WHOLE, 1)
    assert redacted(b"/_security/user/u", gzip.compress(body), JSON, b"gzip", max_parse_bytes=500) == (WHOLE, 1)
    bomb = gzip.compress(b" " * 50_000_000)
    start = time.perf_counter()
    assert redacted(b"/_security/user/u", bomb, JSON, b"gzip") == (WHOLE, 1)
    assert time.perf_counter() - start < 1
    assert redacted(b"/_bulk", bomb, NDJSON, b"gzip") == (WHOLE, 1)


# -- Paths


def disguises(path: bytes) -> list[bytes]:
    """Ways to write a path that some server reads as the same."""
    at = path.index(b"_")
    letter = path[at + 1 : at + 2]
    return [
        path + b"/",
        path + b"//",
        b"/" + path,
        path.replace(b"/", b"//"),
        path.replace(b"_", b"%5f"),
        path.replace(b"_", b"%5F"),
        path.replace(b"_", b"%255f"),
        path.replace(b"_", b"%25255F"),
        path[: at + 1] + b"%%%02x" % letter[0] + path[at + 2 :],
        b"/." + path,
        b"/%2e" + path,
        b"/x/.." + path,
        b"/x/%2E%2e" + path,
        path + b"/.",
        path[:-1] + quote(path[-1:]).encode(),
        b"".join(b"/" if byte == 0x2F else b"%%%02X" % byte for byte in path),
        b"http://host:9200" + path,
    ]


@pytest.mark.parametrize(("path", "text"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_no_way_to_write_the_path_gets_past(path: bytes, text: bytes) -> None:
    for disguised in disguises(path):
        assert redacted(disguised, sent(text)) == (recorded(text), len(MARKED.findall(text))), disguised


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (b"/_xpack/security/user/u/_password", b'{"password":"S3CRET"}'),
        (b"/_xpack/security/oauth2/token", b'{"password":"S3CRET"}'),
        (b"/_xpack/security/saml/authenticate", b'{"content":"S3CRET"}'),
        (b"/_xpack/watcher/watch/w", b'{"input":{"http":{"request":{"auth":{"basic":{"password":"S3CRET"}}}}}}'),
        (b"/_xpack/license", b'{"license":{"signature":"S3CRET"}}'),
        (b"/_shield/user/u", b'{"password":"S3CRET"}'),
        (b"/_opendistro/_security/api/internalusers/u", b'{"hash":"S3CRET"}'),
        (b"/_opendistro/_security/api/account", b'{"current_password":"S3CRET"}'),
        (b"/_opendistro/_security/api/securityconfig/config", b'{"signing_key":"S3CRET"}'),
        # literal to one reader, resolved by another
        (b"/_security/user/%2e%2e/_password", b'{"password":"S3CRET"}'),
        (b"/_security/user/../_password", b'{"password":"S3CRET"}'),
        (b"/_security/user/a%2Fb", b'{"password":"S3CRET"}'),
        (b"/_snapshot/a%2Fb", b'{"settings":{"secret_key":"S3CRET"}}'),
        (b"/_security/user/_bulk", b'{"password":"S3CRET"}'),
        (b"/_security/user/a%0ab", b'{"password":"S3CRET"}'),
        (b"/_security/user/%", b'{"password":"S3CRET"}'),
        (b"/_security/user/%zz", b'{"password":"S3CRET"}'),
        (b"/_security/user/%ff", b'{"password":"S3CRET"}'),
        (b"/_security/user/a;b=c/_password", b'{"password":"S3CRET"}'),
    ],
)
def test_old_names_and_odd_ones(path: bytes, body: bytes) -> None:
    assert redacted(path, body) == (body.replace(b"S3CRET", PLACEHOLDER), 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (b"/", b"{}"),
        (b"/_search", b'{"query":{"match":{"password":"x"}}}'),
        (b"/logs/_search", b'{"query":{"match":{"token":"http://u:p@h/"}}}'),
        (b"/logs-2026.01.01/_doc/1", b'{"password":"document of the user"}'),
        (b"/logs/_create/1", b"{}"),
        (b"/logs/_bulk", b'{"index":{}}\n{"password":"x"}\n'),
        (b"/_bulk", b'{"index":{"_index":"logs"}}\n{"password":"x"}\n'),
        (b"/%3Clogs-%7Bnow%2Fd%7D%3E/_doc", b'{"password":"x"}'),
        (b"/.kibana/_search", b'{"query":{}}'),
        (b"/.security/_search", b'{"query":{}}'),
        (b"/.security", b'{"mappings":{}}'),
        (b"/.kibana/_mapping", b"{}"),
        (b"/.ds-logs-2026/_doc/1", b'{"password":"x"}'),
        (b"/x.security/_doc/1", b'{"password":"x"}'),
        (b"/_security/role/r", b'{"cluster":["all"]}'),
        (b"/_security/api_key", b'{"name":"k"}'),
        (b"/_security/user/u", b""),
        (b"/_security/user/u", b'{"roles":["password"]}'),
        (b"/_security/user/_has_privileges", b'{"cluster":["all"]}'),
        (b"/_nodes/stats", b"{}"),
        (b"/_query", b'{"query":"FROM x"}'),
        (b"/_license/start_trial", b'{"signature":"x"}'),
        (b"/_cluster/settings", b'{"persistent":{"a.b":1,"passwort":"x"}}'),
        (b"/_reindex", b'{"source":{"index":"a","query":{"match":{"password":"x"}}},"dest":{"index":"b"}}'),
        (b"/_monitoring/bulk", b'{"index":{"_index":".kibana"}}\n{"a":1}\n'),
        (b"/_snapshot/repo", b'{"type":"url","settings":{"url":"http://host/path"}}'),
        (b"/_inference/completion/x", b'{"input":"what is the api_key?"}'),
        (b"/_watcher/watch/w", b'{"condition":{"script":{"params":{"limit":5}}},"metadata":{"mail":"a@b.c"}}'),
    ],
)
def test_everything_else_is_recorded_as_it_came(path: bytes, body: bytes) -> None:
    assert redacted(path, body) is None
    if body:
        assert redacted(path, gzip.compress(body), JSON, b"gzip") is None


def test_the_one_search_knows_the_whole_table() -> None:
    for row in es_proxy._TABLE:
        assert es_proxy._MAY_BE_LISTED.search(row.begin)
    for path in (
        b"/",
        b"/logs/_search",
        b"/logs-2026.01.01/_doc/1",
        b"/_cat/indices",
        b"/_msearch",
        b"/a/_mget",
        b"/_mapping",
    ):
        assert not es_proxy._MAY_BE_LISTED.search(path)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://user:S3CRET@host:80/p", "http://::es_redacted::@host:80/p"),
        ("http://user:S3/CR?E#T@host/p", "http://::es_redacted::@host/p"),
        ("http://S3CRET@host", "http://::es_redacted::@host"),
        ("http://u:S3 CRET@host", "http://::es_redacted::@host"),
        ("http://u:S3@CRET@host", "http://::es_redacted::@host"),
        ("see https://u:S3CRET@host/ and mail a@b.c", "see https://::es_redacted::@host/ and mail a@b.c"),
    ],
)
def test_userinfo_in_urls(url: str, kept: str) -> None:
    for path, name in ((b"/_snapshot/r", "settings.url"), (b"/_reindex", "host"), (b"/_watcher/watch/w", "url")):
        for spelled in (json.dumps(url), json.dumps(url).replace("/", "\\/"), json.dumps(url).replace("@", "\\u0040")):
            found = redacted(path, f'{{"{name}": {spelled}, "z": [1.0]}}'.encode())
            assert found == (f'{{"{name}": {json.dumps(kept)}, "z": [1.0]}}'.encode(), 1)


# -- Documents of secret indices

SECRET_INDICES = [
    ".security",
    ".security-7",
    ".security-tokens-7",
    ".fleet-enrollment-api-keys",
    ".fleet-enrollment-api-keys-7",
    ".kibana",
    ".kibana_1",
    ".kibana_task_manager_8.11.0_001",
    ".watches",
    ".fleet-secrets-7",
    ".connector-secrets-1",
    ".secrets-inference",
    ".opendistro_security",
    "<.security-{now/d}>",
    "<.sec{now/d{'urity'}}-7>",
    "<{now/d{'.security'}}>",
]


@pytest.mark.parametrize("index", SECRET_INDICES)
@pytest.mark.parametrize(
    "rest", ["/_doc/1", "/_doc", "/_create/1", "/_update/1", "/_doc/1/_create", "/doc/1", "/doc/1/_update"]
)
def test_a_document_is_replaced_whole(index: str, rest: str) -> None:
    encoded = quote(index, safe="").encode() + rest.encode()
    for path in (
        b"/" + encoded,
        b"//" + encoded,
        b"/" + encoded.replace(b"s", b"%73"),
        b"/" + encoded.replace(b".", b"%2E"),
        b"/" + encoded.replace(b"%", b"%25"),
        b"/other," + encoded if index[0] == "." else b"/" + encoded,
    ):
        for type_, body in (
            (JSON, b'{"password":"S3CRET"}'),
            (b"application/smile", b":)\nS3CRET"),
            (b"application/yaml", b"S3CRET"),
        ):
            assert redacted(path, body, type_) == (WHOLE, 1)
            assert redacted(path, gzip.compress(body), type_, b"gzip") == (WHOLE, 1)


BULK = b"""\
{"index":{"_index":"logs","_id":"1"}}
{"password":"of a user"}
{"index":{"_index":".security-7","_id":"user-u"}}
<<{"password":"$2a$S3CRET","type":"user"}>>
{"delete":{"_index":".security-7","_id":"user-v"}}
{ "create" : { "_id" : "2", "_index" : ".kibana_1" } }
<<{"config":"S3CRET"}>>
{"create":{"_index":".ds-logs","_id":".security"}}
{"text":"about \\".kibana\\"","index":".kibana"}
{"update":{"_index":"logs","_id":"\\u002ekibana","routing":".security"}}
{"doc":{"index":{"_index":".security"}}}
{"index":{"_index":"logs"}}
{"index":"no action"}
{"update":{"_id":"x","_index":".fleet-enrollment-api-keys"}}
<<{"doc":{"api_key":"S3CRET"}}>>
{"index":{"_index":"\\u002esecurity"}}
<<{"a":"S3CRET"}>>
{"index":{"_index":".secur\\u0069ty-7"}}
<<{"a":"S3CRET"}>>
{"\\u0069ndex":{"\\u005Findex":"\\u002E\\u006bibana"}}
<<{"a":"S3CRET"}>>
{"index":{"_index":"<.security-{now/d}>"}}
<<{"a":"S3CRET"}>>
{"index":{"_index":"\\u003c.sec{now/d{'urity'}}-7>"}}
<<{"a":"S3CRET"}>>
{"index":{"_index":"<logs-{now/d}>"}}
{"a":"b"}
\t {"index":{"_index":".watches"}}
<<  {"a":"S3CRET"}>>
/* */{"index":{"_index":".watches"}}
<<{"a":"S3CRET"}>>
{/*x*/"index"/**/:{"_index"/**/:/**/".watches"}}
<<{"a":"S3CRET"}>>
{"index":{"_index":"a","_index":".security"}}
<<{"a":"S3CRET"}>>
\xef\xbb\xbf{"index":{"_index":".security"}}
<<{"a":"S3CRET"}>>

{"index":{"_index":"logs"}}
{"index":{"a":"kept, though it looks like an action"}}
{"index":{"_index":".security"}}
<<{"index":{"_index":".security","a":"S3CRET"}}>>
<<{"index":{"_index":"logs"}}>>
{"taken":"the line before went because the one before it looks like an action, too"}
{"index":{"_index":".security"}}
<<not even JSON S3CRET>>
{"create":{"_index":".security"}}
<<{"a":"S3CRET, and no newline"}>>"""


def test_bulk() -> None:
    expected = (recorded(BULK), len(MARKED.findall(BULK)))
    body = sent(BULK)
    for path in (
        b"/_bulk",
        b"/logs/_bulk",
        b"/logs/doc/_bulk",
        b"/_bulk/",
        b"//_bulk",
        b"/%5fbulk",
        b"/_bulk/stream",
        b"/x/../_bulk",
    ):
        for type_ in (NDJSON, JSON, b"", b"application/vnd.elasticsearch+x-ndjson;compatible-with=9"):
            assert redacted(path, body, type_) == expected, (path, type_)
    for coding, packed in ((b"gzip", gzip.compress(body)), (b"deflate", zlib.compress(body)), (b"made-up", body)):
        assert redacted(b"/_bulk", packed, NDJSON, coding) == expected


def test_bulk_in_other_line_ends_and_without_the_last() -> None:
    for end in (b"\n", b"\r\n", b""):
        assert redacted(b"/_bulk", b'{"index":{"_index":".kibana"}}\n{"a":"S3CRET"}' + end) == (
            b'{"index":{"_index":".kibana"}}\n' + WHOLE + (b"\n" if end else b""),
            1,
        )
    assert redacted(b"/_bulk", b'{"index":{"_index":".kibana"}}\n') is None
    assert redacted(b"/_bulk", b'{"index":{"_index":".kibana"}}') is None


def test_bulk_to_a_secret_index_in_the_path() -> None:
    text = (
        b'{"index":{"_id":"1"}}\n<<{"a":"S3CRET"}>>\n{"create":{}}\n<<{"index":"S3CRET"}>>\n{"delete":{"_id":"4"}}\n'
        b'{"index":{"_index":"customers"}}\n{"kept":"as it goes elsewhere"}\n'
        b'{"index":{"\\u005findex":"customers"}}\n{"kept":1}\n'
        b'{"update":{"_id":"_index"}}\n<<{"doc":"S3CRET"}>>\n{"index":{"_index":".security"}}\n<<S3CRET>>\n'
    )
    for path in (
        b"/.kibana/_bulk",
        b"/.security-7/_bulk/",
        b"/%2ekibana/_bulk",
        b"/%3C.security-%7Bnow%2Fd%7D%3E/_bulk",
        b"/_arrow/.kibana/_bulk",
    ):
        assert redacted(path, sent(text)) == (recorded(text), 4), path
        assert redacted(path, gzip.compress(sent(text)), NDJSON, b"gzip") == (recorded(text), 4)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be"])
def test_bulk_in_what_jackson_detects(encoding: str) -> None:
    text = '{"index":{"_index":".security"}}\n{"b":"S3CRET"}\n{"index":{"_index":".s\\u0065curity"}}\n{"a":"S3CRET"}\n'
    body = redacted(b"/_bulk", text.encode(encoding))
    assert body is not None
    assert "S3CRET".encode(encoding)[2:-2] not in body[0]
    assert redacted(b"/_bulk", text.replace(".security", "logs").replace(".s\\u0065", "l").encode(encoding)) is None


@pytest.mark.parametrize(
    "type_",
    [
        b"application/smile",
        b"application/vnd.elasticsearch+smile",
        b"application/cbor",
        b"application/yaml",
        b"application/vnd.apache.arrow.stream",
    ],
)
def test_bulk_that_has_no_lines(type_: bytes) -> None:
    for body in (
        b":)\n\x04\xfa\x84index\xfa\x85_index\x48.security\xfb\xfb\xff:)\n\x04S3CRET",
        b"\xff\x00.kibana_1S3CRET",
    ):
        assert redacted(b"/_bulk", body, type_) == (WHOLE, 1)
        assert redacted(b"/_bulk", gzip.compress(body), type_, b"gzip") == (WHOLE, 1)
        assert (
            redacted(b"/_bulk", body.replace(b".security", b"xsecurity").replace(b".kibana", b"xkibana"), type_) is None
        )
        assert redacted(b"/.kibana/_bulk", body.replace(b".", b"x"), type_) == (WHOLE, 1)
    assert redacted(b"/_bulk", b":)\n\x04.security S3CRET", JSON) == (WHOLE, 1)


def test_bulk_compressed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    body, expected = gzip.compress(sent(BULK)), (recorded(BULK), len(MARKED.findall(BULK)))
    for step in (1, 2, 7, 64, 300):
        monkeypatch.setattr(es_proxy, "_STEP_BYTES", step)
        assert redacted(b"/_bulk", body, NDJSON, b"gzip") == expected, step
        raw = zlib.compressobj(wbits=-15)
        spaces = raw.compress(sent(BULK) + b"\n" + b" " * 5000) + raw.flush()
        assert redacted(b"/_bulk", spaces, NDJSON, b"deflate") == (expected[0] + b"\n" + b" " * 5000, expected[1])
    assert redacted(b"/_bulk", body, NDJSON, b"gzip", max_parse_bytes=20) == (WHOLE, 1)


def test_inflating_in_pieces_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(es_proxy, "_STEP_BYTES", 7)
    for spaces in range(300):
        raw = zlib.compressobj(9, wbits=-15)
        body = raw.compress(b'{"password":1}' + b" " * spaces) + raw.flush()
        expected = b'{"password":' + WHOLE + b"}" + b" " * spaces
        assert redacted(b"/_security/user/u", body, JSON, b"deflate") == (expected, 1)


def test_a_name_is_found_wherever_the_search_stops() -> None:
    for escape in (False, True):
        name = "".join(f"\\u{ord(char):04x}" for char in ".security") if escape else ".security"
        action = f'{{"index":{{"_index":"{name}"}}}}\n'.encode()
        for shift in range(-len(action) - 3, 10):
            start = b'{"a":"' + b"x" * (es_proxy._SEARCH_BYTES + shift - 8) + b'"}\n'
            for more in (b"", b"\n" * es_proxy._NAME_BYTES):
                assert redacted(b"/_bulk", start + more + action + b"S3CRET\n") == (
                    start + more + action + WHOLE + b"\n",
                    1,
                )


def test_bulk_with_more_secrets_than_any_client_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(es_proxy, "_SECRET_DOCUMENTS", 10)
    lines = b'{"create":{"_index":".kibana"}}\n{}\n'
    assert redacted(b"/_bulk", lines * 10) == (lines.replace(b"{}", WHOLE) * 10, 10)
    assert redacted(b"/_bulk", lines * 11) == (WHOLE, 1)


def test_bulk_compressed_and_broken() -> None:
    packed = gzip.compress(sent(BULK))
    for broken in (packed[:-5], packed[:40], packed + b"junk", b"junk", sent(BULK)):
        assert redacted(b"/_bulk", broken, NDJSON, b"gzip") == (WHOLE, 1)
    assert redacted(b"/_bulk", b"\x28\xb5\x2f\xfd", NDJSON, b"zstd") == (WHOLE, 1)


def test_bodies_in_files() -> None:
    for path, text in ((b"/_bulk", BULK), ROWS[0][1:]):
        with tempfile.TemporaryFile() as file:
            file.write(sent(text))
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                found = redact_body(path, JSON, b"", mapped)
                assert found is not None
                assert b"".join(found.pieces) == recorded(text)


def test_a_large_bulk_comes_in_pieces() -> None:
    lines = b'{"index":{"_index":"logs"}}\n{"a":"b"}\n' * 100_000
    secret = b'{"index":{"_index":".kibana"}}\n{"a":"S3CRET"}\n'
    found = redact_body(b"/_bulk", NDJSON, b"", lines + secret + lines)
    assert found is not None
    assert found.count == 1
    assert max(map(len, found.pieces)) <= es_proxy._STEP_BYTES
    assert b"".join(found.pieces) == lines + secret.replace(b'{"a":"S3CRET"}', WHOLE) + lines


# -- Queries


def test_source_in_the_query() -> None:
    body = '{"password":"S3CRET &;+%","roles":["a b"]}'
    for spelled in (quote(body, safe=""), quote(body, safe="").replace("%20", "+")):
        for name in ("source", "%73ource"):
            query, count = redact_query(
                b"/_security/user/u", f"pretty&{name}={spelled}&source_content_type=application%2Fjson".encode()
            )
            assert count == 1
            assert query.startswith(b"pretty&" + name.encode() + b"=")
            assert query.endswith(b"&source_content_type=application%2Fjson")
            value = unquote_to_bytes(query.split(b"&")[1].partition(b"=")[2])
            assert value.replace(b"+", b" ") == b'{"password":"::es_redacted::","roles":["a b"]}'
    for broken in (body, body.replace("%", ""), quote(body, safe="&;"), "---%0Apassword:%20S3CRET", "%7B"):
        assert redact_query(b"/_security/user/u", f"pretty=true&source={broken}&x=1".encode()) == (
            b"pretty=true&source=" + PLACEHOLDER,
            1,
        )
    assert redact_query(b"/%5fsecurity/user/u/", b"source=%7B%22password%22:1%7D")[1] == 1
    assert redact_query(b"/.kibana/_doc/1", b"source=%7B%7D") == (b"source=" + PLACEHOLDER, 1)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (b"/_search", b""),
        (b"/_search", b"q=user:kimchy&size=1&source=%7B%22query%22:%7B%7D%7D"),
        (b"/_search", b"source={%22password%22:1}"),
        (b"/_security/user/u", b"refresh=true&source=%7B%22roles%22:[]%7D"),
        (b"/_search", b"_source=password&_source_includes=token,secret&q=token:x&preference=token"),
        (b"/_security/api_key", b"id=abc&name=token&owner=true"),
        (b"/_search/scroll", b"scroll_id=DXF1ZXJ5QW5kRmV0Y2gB"),
    ],
)
def test_other_queries_stay(path: bytes, query: bytes) -> None:
    assert redact_query(path, query) == (query, 0)


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        (b"pretty&token=S3CRET", b"pretty&token=::es_redacted::"),
        (b"access_token=S3CRET&a=b", b"access_token=::es_redacted::&a=b"),
        (b"Api-Key=S3CRET;apikey=S3CRET", b"Api-Key=::es_redacted::;apikey=::es_redacted::"),
        (b"t%6fken=S3CRET", b"t%6fken=::es_redacted::"),
        (b"urlparam=eyJhbGciOi.eyJzdWIi.S3CRET&a", b"urlparam=::es_redacted::&a"),
        (b"u=Bearer%20eyJhbGciOi%2eeyJzdWIi.S3CRET", b"u=::es_redacted::"),
        (
            b"X-Amz-Signature=S3CRET&X-Amz-Date=1&X-Amz-Security-Token=S3CRET",
            b"X-Amz-Signature=::es_redacted::&X-Amz-Date=1&X-Amz-Security-Token=::es_redacted::",
        ),
    ],
)
def test_credentials_in_the_query(query: bytes, kept: bytes) -> None:
    assert redact_query(b"/_search", query)[0] == kept


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (b"http://u:S3CRET@host:9200/_search", b"http://::es_redacted::@host:9200/_search"),
        (b"HTTPS://S3CRET@host", b"HTTPS://::es_redacted::@host"),
        (b"u:S3CRET@host:9200", b"::es_redacted::@host:9200"),
        (b"http://u:S3/C RE@T@host/", b"http://::es_redacted::@host/"),
        (b"//u:S3CRET@host/", b"//::es_redacted::@host/"),
    ],
)
def test_userinfo_in_targets(target: bytes, kept: bytes) -> None:
    assert redact_userinfo(target) == (kept, 1)
    assert redact_userinfo(b"GET " + target + b" HTTP/1.1") == (b"GET " + kept + b" HTTP/1.1", 1)


def test_targets_without_userinfo() -> None:
    for target in (
        b"/",
        b"/i/_doc/bob@example.com",
        b"/a:b/c@d",
        b"http://host:9200/",
        b"*",
        b"@",
        b"bob@host",
        b"//host/",
    ):
        assert redact_userinfo(target) == (target, 0)


# -- Received

NAMES = [
    b"Authorization",
    b"Proxy-Authorization",
    b"es-secondary-authorization",
    b"ES-Client-Authentication",
    b"Cookie",
    b"Set-Cookie",
    b"X-Api-Key",
    b"X-Amz-Security-Token",
    b"x-found-auth",
    b"kbn-session",
    b"securitytenant-secret",
]
REQUEST = (
    b"GET /logs/_search HTTP/1.1\r\nHost: h:9200\r\nUser-Agent: curl/8\r\n%b\r\nAccept: */*\r\n\r\nthe body: kept\r\n"
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "field",
    [
        b"%b: Sch S3CRET",
        b"%b:S3CRET",
        b"%b : S3CRET",
        b"%b\t \t: S3CRET",
        b" %b: S3CRET",
        b"%b:\t\tS3CRET\xff\x00\x7f",
        b"%b:\r\n S3CRET",
        b"%b: x\r\n\tS3CRET\r\n  S3CRET",
        b"%b: x\nS3CRET",
        b"%b: x\r S3CRET",
        b"%b: x\rS3CRET",
        b"%b: x\r\r\n S3CRET",
        b"x: y %b: S3CRET",
        b"x: y\x0b%b: S3CRET",
        b"x:y\0%b: S3CRET",
        b"\xef\xbb\xbf%b: S3CRET",
        b'"%b": "S3CRET"',
        b"%b::S3CRET",
        b"%b: S3CRET@host",
        b"%b:S3CRET://x@host",
        b"%b:\0S3CRET",
        b"X-%b: S3CRET",
        b"%b\r\n: S3CRET"[:2] + b"\x00: S3CRET",
        b"%b: Basic\r\n S3CRET",
    ],
)
def test_credential_fields_are_removed(name: bytes, field: bytes) -> None:
    for spelled in (name, name.upper(), name.lower(), name.replace(b"-", b"_"), name[:3] + b"\0" + name[3:]):
        for end in (b"\r\n", b"\n", b"\r"):
            for request in (REQUEST, REQUEST.replace(b"GET /logs", b"GET http://h/logs"), b"%b"):
                data, count = redact_received((request % (field % spelled)).replace(b"\r\n", end))
                assert b"S3CRET" not in data
                assert count
                if request is REQUEST:
                    assert data.startswith(b"GET /logs/_search HTTP/1.1" + end + b"Host: h:9200")
                    assert b"Accept: */*" in data
                    assert data.rstrip().endswith(b"kept") or b"//" in field  # which is a path trick, too


@pytest.mark.parametrize(
    "data",
    [
        b"Authorization Basic S3CRET",
        b"authorization=S3CRET",
        b"Cookie\tsid=S3CRET",
        b"Foo: Basic S3CRET",
        b"Foo: bearer S3CRET",
        b"Foo: ApiKey\r\n S3CRET",
        b"Foo:Negotiate S3CRET==",
        b"X Digest username=a, response=S3CRET",
        b"Z: AWS4-HMAC-SHA256 Credential=a, Signature=S3CRET",
        b"Cookie:a=b@S3CRET",
        b"GET http://u:S3CRET@h/ HTTP/1.1\r\n",
        b"GET http://u:S3 CRET@h/ HTTP/1.1\r\nHost: a\r\n",
        b"GET http://u:S3\nCRET@h/ HTTP/1.1",
        b"CONNECT u:S3CRET@h:443 HTTP/1.1\r\n\r\n",
        b"GET http://authn:authS3CRET:x@h:80/ HTTP/1.1",
        b"GET u:S3CRET@h\r\n",
        b"GET /x?token=S3CRET x HTTP/1.1",
        b'GET /_security/user/u?source={"password": "S3CRET", "S3CRET"} HTTP/1.1\r\nA: b',
        b'GET /x?a&source={"x":\n"S3CRET"} HTTP/1.1\r\nA: b',
        b'PUT /_security/user/u HTTP/1.1\r\nHost: a b\r\n\r\n{"x":"S3CRET"}',
        b'PUT _security/user/u HTTP/1.1\n\n{"x":"S3CRET"}',
        b'PUT /%5fsecurity/user/u HTTP/1.1\r\r{"x":"S3CRET"}',
        b'PUT //x HTTP/1.1\r\n \r\n{"x":"S3CRET"}',
        b'GET / HTTP/1.1\r\nA: b\r\n\r\nPOST .kibana/_doc HTTP/1.1\r\n\r\n{"x":"S3CRET"}',
        b'POST /_bulk HTTP/1.1\r\nBad Field\r\n\r\n{"index":{"_index":".security"}}\n{"x":"S3CRET"}',
        b'{"password": "S3CRET"}',
        b'\n  "password" :\n  "S3CRET"',
    ],
)
def test_other_secrets_received(data: bytes) -> None:
    kept, count = redact_received(data)
    assert b"S3CRET" not in kept
    assert not re.search(rb"S3.{0,2}CRET", kept, re.DOTALL)
    assert b"S3" not in kept
    assert b"CRET" not in kept
    assert count


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h:9200\r\nUser-Agent: curl/8.1\r\nAccept: */*\r\n\r\n",
        b"POST /logs/_search HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /admin HTTP/1.1\r\nX: y\r\n\r\n",
        b"GET /_security/_authenticate HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /i/_doc/bob@example.com HTTP/1.1\r\nFrom: bob@example.com\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"basic\r\n",
        b"GET /basic HTTP/1.1\r\n",
    ],
)
def test_what_is_no_secret_stays(data: bytes) -> None:
    assert redact_received(data) == (data, 0)


# -- At random


def random_json(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([rng.randrange(-(10**20), 10**20), rng.random() * 1e30, 0, -1.5e-7])
    if kind <= 4:
        return "".join(rng.choice('ab"\\/\n\t\u00e9\u20ac\U0001f600 {}[]:,.') for _ in range(rng.randrange(12)))
    if kind == 5:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {
        f"k{rng.randrange(50)}{rng.choice(['', '.x', chr(0xE9), ' '])}": random_json(rng, depth - 1)
        for _ in range(rng.randrange(4))
    }


def planted(rng: random.Random, value: object, keys: tuple[str, ...], secret: object) -> object:
    """`value` in some object of which the secret hides under the dotted path `keys`, cut into keys at random."""
    if rng.random() < 0.4:
        return {"wrap": planted(rng, value, keys, secret), "other": random_json(rng, 1)}
    if rng.random() < 0.2:
        return [random_json(rng, 1), planted(rng, value, keys, secret)]
    parts, inner = list(keys), secret
    while parts:
        taken = rng.randint(1, len(parts))
        member = {".".join(parts[-taken:]): inner}
        del parts[-taken:]
        # Not beside the inner keys: there the table may have a star.
        inner = member if parts else {"before": value, **member, "after": random_json(rng, 1)}
        if parts and rng.random() < 0.2:
            inner = [inner]
    return inner


FIELDS = [
    (b"/_security/user/u", "password"),
    (b"/_security/user/u/_password", "password_hash"),
    (b"/_security/oauth2/token", "refresh_token"),
    (b"/_security/api_key/grant", "client_authentication.value"),
    (b"/_reindex", "source.remote.password"),
    (b"/_reindex", "source.remote.headers.X"),
    (b"/_watcher/watch/w", "auth.basic.password"),
    (b"/_watcher/watch/w", "input.http.request.headers.X"),
    (b"/_inference/x", "service_settings.secret_parameters.p"),
    (b"/_connector/c/_configuration", "configuration.host.value"),
    (b"/_cluster/settings", "a.b_secret_c"),
    (b"/_plugins/_query/_datasources", "prometheus.auth.secret_key"),
    (b"/_plugins/_ml/models/_register", "credential"),
]


@pytest.mark.parametrize("seed", range(40))
def test_at_random_no_secret_is_left_and_nothing_else_changes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        path, field = rng.choice(FIELDS)
        secret = rng.choice(["MARKER", ["MARKER", 1], {"a": {"b": "MARKER"}}, {"c": ["MARKER"]}])
        tree = planted(rng, random_json(rng, 3), tuple(field.split(".")), "\x01")
        layout = rng.choice([{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" , ", "\t:\r\n ")}])
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, **layout)  # type: ignore[arg-type]
        before, after = text.split('"\\u0001"')
        body = (before + json.dumps(secret) + after).encode()
        coding = rng.choice([b"", b"gzip", b"deflate"])
        packed = body if not coding else gzip.compress(body) if coding == b"gzip" else zlib.compress(body)
        assert redacted(path, packed, JSON, coding) == ((before + WHOLE.decode() + after).encode(), 1)


def escaped(rng: random.Random, text: str) -> str:
    return "".join(rng.choice((f"\\u{ord(c):04x}", f"\\u{ord(c):04X}")) if rng.random() < 0.2 else c for c in text)


@pytest.mark.parametrize("seed", range(40))
def test_at_random_bulk_agrees_with_one_that_parses(seed: int) -> None:
    rng = random.Random(seed)
    default = rng.choice(["", "logs", ".kibana"])
    sent_lines: list[bytes] = []
    expected: list[bytes] = []
    for _ in range(60):
        action = rng.choice(["index", "create", "update", "delete"])
        index = rng.choice(["logs", "a.security", "x", ".ds-x", *SECRET_INDICES] + ([""] if default else []))
        meta = {"_id": rng.choice(["1", ".x", "_index", 'a"b']), **({"_index": index} if index else {})}
        members = ",".join(
            f'"{escaped(rng, k)}":"{escaped(rng, json.dumps(v)[1:-1]) if k == "_index" else json.dumps(v)[1:-1]}"'
            for k, v in sorted(meta.items(), key=lambda _: rng.random())
        )
        gap = rng.choice(["", " ", "\t"])
        sent_lines.append(f'{gap}{{{gap}"{escaped(rng, action)}"{gap}:{gap}{{{members}}}}}{gap}'.encode())
        expected.append(sent_lines[-1])
        secret = (index or default)[:1] in (".", "<") and index != ".ds-x"
        if action != "delete":
            document = {
                rng.choice(["@timestamp", "doc", "in", "updated", ""]): random_json(rng, 2),
                "m": "MARKER" if secret else ".kibana",
            }
            sent_lines.append(json.dumps(document).encode())
            expected.append(WHOLE if secret else sent_lines[-1])
        elif b"delete" not in sent_lines[-1] and secret:
            # An action in escapes may be any: the line behind it goes, too much rather than too little.
            sent_lines.append(b"")
            expected.append(b"")
    body, want = b"\n".join(sent_lines) + b"\n", b"\n".join(expected) + b"\n"
    path = b"/%b/_bulk" % default.encode() if default else b"/_bulk"
    found = redacted(path, body)
    assert (found[0] if found else body) == want
    packed = redacted(path, gzip.compress(body), NDJSON, b"gzip")
    assert (packed[0] if packed else body) == want
    assert b"MARKER" not in want


@pytest.mark.parametrize("seed", range(20))
def test_at_random_noise_is_survived(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        noise = bytes(
            rng.choice(b'{}[]":,\\\n\r\t \0@/%.=&;_adAuthorization:securitykibana\xff')
            for _ in range(rng.randrange(200))
        )
        for path in (b"/_bulk", b"/.kibana/_bulk", b"/_security/user/u", b"/" + noise):
            for coding in (b"", b"gzip"):
                redact_body(path, JSON, coding, noise)
        redact_query(b"/_security/user/" + noise, noise + b"&source=" + noise)
        redact_received(noise)
        redact_userinfo(noise)


# -- Through the running proxy: the record is redacted, what is forwarded is not


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_each_request_is_forwarded_untouched_and_recorded_without_its_secrets(tmp_path: Path, coding: str) -> None:
    """Every row as a request: upstream has every byte of it, the log has the placeholder, and says how many."""
    with MockES() as upstream, running_proxy(upstream.port, tmp_path / "audit.log") as proxy:
        for number, (_, path, text) in enumerate(ROWS):
            body = gzip.compress(sent(text)) if coding else sent(text)
            headers = {"Content-Type": "application/json"} | ({"Content-Encoding": coding} if coding else {})
            proxy.request("PUT", path.decode(), body, headers)
            assert upstream.requests[number].body == body
        records = [request for request, _ in proxy.pairs()]
    for (_, path, text), record in zip(ROWS, records, strict=True):
        assert record.body == recorded(text), path
        assert int(record.marks["Redacted"]) >= 1


def test_without_redaction_bodies_are_recorded_as_they_came_and_that_is_on_record(tmp_path: Path) -> None:
    """--no-redact."""
    body = b'{"password":"secret"}'
    with MockES() as upstream, running_proxy(upstream.port, tmp_path / "audit.log", redact=False) as proxy:
        proxy.request("PUT", "/_security/user/a?token=x", body)
        records = proxy.records()
    assert [record.id for record in records if record.kind == "event"] == ["start", "no-redact"]
    ((request, _),) = pairs(records)
    assert (request.body, request.query) == (body, b"token=x")
    assert "Redacted" not in request.marks


def test_a_large_body_is_redacted_in_a_file(tmp_path: Path) -> None:
    """A _bulk beyond what is held in memory: only the secret document is replaced."""
    ordinary = b'{"index":{"_index":"a"}}\n' + b'{"text":"' + b"x" * 1000 + b'"}\n'
    secret = b'{"index":{"_index":".security-7"}}\n<<{"password":"S3CRET"}>>\n'
    text = ordinary * 2000 + secret + ordinary
    with MockES() as upstream, running_proxy(upstream.port, tmp_path / "audit.log") as proxy:
        proxy.request("POST", "/_bulk", sent(text), {"Content-Type": "application/x-ndjson"})
        ((request, _),) = proxy.pairs()
    assert request.body == recorded(text)
    assert request.marks["Redacted"] == "1"


def test_a_refused_request_is_recorded_without_credentials(tmp_path: Path) -> None:
    """What was received of it is on record, but not its Authorization, and not the user and password in its target."""
    with MockES() as upstream, running_proxy(upstream.port, tmp_path / "audit.log") as proxy:
        proxy.ask(b"GET http://me:S3CRET@a/x HTTP/1.1\r\nHost: a\r\nAuthorization : Basic UzNDUkVU\r\n\r\n")
        ((request, _),) = proxy.pairs()
    assert b"S3CRET" not in request.path + request.body
    assert b"UzNDUkVU" not in request.body
    assert upstream.requests == []
