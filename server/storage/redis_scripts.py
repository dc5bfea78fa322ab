"""What the Redis store has Valkey do in one piece: Lua scripts, each applied whole.

Keys, for a session S of model M made by request R:

    ntm:session:S    hash: model, request, next, use, content, fence; owner, snapshot and end where there is one
    ntm:records:S    list: first step and content of each record in turn, in order of step
    ntm:request:R    S
    ntm:living       sorted set of ids for paging, all with score 0; ntm:living:M those of one model
    ntm:use          sorted set of living ids by service time of last use
    ntm:ended        sorted set of ended ids by time
    ntm:replica:P    exists while replica P's lease runs
    ntm:clock        hash: service_us, beat_us (the time of the last beat)
    ntm:schema       version of this layout

Scripts name their keys themselves, which Redis Cluster does not allow: one session's write also touches sets that all
share. Those that make room, or keep a replica alive, are allowed when memory is full (allow-oom); the others are
refused then before they begin.
"""

from __future__ import annotations

SCHEMA_VERSION = 1

_READING = "#!lua flags=no-writes\n"
_GROWING = "#!lua\n"
_WHEN_FULL_TOO = "#!lua flags=allow-oom\n"

_SHARED = """
local function entry(id)
  local key = 'ntm:session:' .. id
  return {id, unpack(redis.call('HMGET', key, 'model', 'request', 'next', 'use', 'content', 'end'))}
end
local function lives(replica)
  return redis.call('EXISTS', 'ntm:replica:' .. replica) == 1
end
"""

_WRITE = """
-- ARGV: replica; then of each write its id, fence, next_step, last_use_s, the letters of its parts, and the parts.
-- Returns for each 1, 0 if it is fenced, or who has the id or the request; nothing if the lease has lapsed.
if not lives(ARGV[1]) then
  return {}
end
local at = 1
local function take()
  at = at + 1
  return ARGV[at]
end
local results = {}

local function create(id, use, model, request)
  redis.call('HSET', 'ntm:session:' .. id, 'model', model, 'request', request, 'owner', ARGV[1], 'fence', 1)
  if request ~= '' then
    redis.call('SET', 'ntm:request:' .. request, id)
  end
  redis.call('ZADD', 'ntm:living', 0, id)
  redis.call('ZADD', 'ntm:living:' .. model, 0, id)
end

local function finish(id, model)
  local now = redis.call('TIME')
  local time = string.format('%d.%06d', now[1], now[2])
  redis.call('DEL', 'ntm:records:' .. id)
  redis.call('HDEL', 'ntm:session:' .. id, 'owner', 'snapshot')
  redis.call('HSET', 'ntm:session:' .. id, 'end', time)
  redis.call('ZREM', 'ntm:living', id)
  redis.call('ZREM', 'ntm:living:' .. model, id)
  redis.call('ZREM', 'ntm:use', id)
  redis.call('ZADD', 'ntm:ended', time, id)
end

while at < #ARGV do
  local id, fence, next_step, use, parts = take(), take(), take(), take(), take()
  local first_step, record, model, request, content, snapshot, forget_before
  if parts:find('r', 1, true) then first_step, record = take(), take() end
  if parts:find('e', 1, true) then model, request, content = take(), take(), take() end
  if parts:find('s', 1, true) then snapshot = take() end
  if parts:find('f', 1, true) then forget_before = tonumber(take()) end
  local releases, ends = parts:find('o', 1, true), parts:find('x', 1, true)

  local key, records = 'ntm:session:' .. id, 'ntm:records:' .. id
  local result = 1
  if fence == '-1' then
    local known = request ~= '' and redis.call('GET', 'ntm:request:' .. request)
    if known then
      result = {'request', unpack(entry(known))}
    elseif redis.call('EXISTS', key) == 1 then
      result = {'id', unpack(entry(id))}
    else
      create(id, use, model, request)
    end
  else
    local owned = redis.call('HMGET', key, 'owner', 'fence')
    if owned[1] ~= ARGV[1] or owned[2] ~= fence then
      result = 0
    end
  end

  if result == 1 then
    redis.call('HSET', key, 'next', next_step, 'use', use)
    if content then redis.call('HSET', key, 'content', content) end
    if ends then
      finish(id, model)
    else
      redis.call('ZADD', 'ntm:use', use, id)
      if record then redis.call('RPUSH', records, first_step, record) end
      if snapshot == '' then
        redis.call('HDEL', key, 'snapshot')
      elseif snapshot then
        redis.call('HSET', key, 'snapshot', snapshot)
      end
      if forget_before then
        local kept_from = 0
        local later = redis.call('LINDEX', records, 2)
        while later and tonumber(later) <= forget_before do
          kept_from = kept_from + 2
          later = redis.call('LINDEX', records, kept_from + 2)
        end
        redis.call('LTRIM', records, kept_from, -1)
      end
      if releases then redis.call('HDEL', key, 'owner') end
    end
  end
  results[#results + 1] = result
end
return results
"""

WRITE = _GROWING + _SHARED + _WRITE
WRITE_WHEN_FULL_TOO = _WHEN_FULL_TOO + _SHARED + _WRITE

CLAIM = (
    _WHEN_FULL_TOO
    + _SHARED
    + """
-- ARGV: replica, id. Returns 'lapsed', 'unknown', or the entry after one of 'ended', 'owned' (then owner, milliseconds
-- left of its lease) and 'claimed' (then fence, snapshot, records, and 1 if another replica owned it, which is dead).
local replica, id = ARGV[1], ARGV[2]
if not lives(replica) then
  return {'lapsed'}
end
local key = 'ntm:session:' .. id
local state = redis.call('HMGET', key, 'fence', 'end', 'owner')
if not state[1] then
  return {'unknown'}
end
if state[2] then
  return {'ended', entry(id)}
end
local owner = state[3]
if owner and owner ~= replica and lives(owner) then
  return {'owned', entry(id), owner, redis.call('PTTL', 'ntm:replica:' .. owner)}
end
local fence = redis.call('HINCRBY', key, 'fence', 1)
redis.call('HSET', key, 'owner', replica)
local snapshot = redis.call('HGET', key, 'snapshot') or ''
local is_from_dead = (owner and owner ~= replica) and 1 or 0
return {'claimed', entry(id), fence, snapshot, redis.call('LRANGE', 'ntm:records:' .. id, 0, -1), is_from_dead}
"""
)

PAGE = (
    _READING
    + _SHARED
    + """
-- ARGV: sorted set, where to begin, size. Returns entries.
local ids = redis.call('ZRANGEBYLEX', ARGV[1], ARGV[2], '+', 'LIMIT', 0, ARGV[3])
for index, id in ipairs(ids) do
  ids[index] = entry(id)
end
return ids
"""
)

FIND_IDLE = (
    _READING
    + _SHARED
    + """
-- ARGV: replica, before, offset, size. Looks at up to `size` ids; returns how many, and those that are free or ours.
local ids = redis.call('ZRANGEBYSCORE', 'ntm:use', '-inf', '(' .. ARGV[2], 'LIMIT', ARGV[3], ARGV[4])
local is_taken = {[ARGV[1]] = false}
local found = {}
for _, id in ipairs(ids) do
  local owner = redis.call('HGET', 'ntm:session:' .. id, 'owner')
  if owner and is_taken[owner] == nil then
    is_taken[owner] = lives(owner)
  end
  if not (owner and is_taken[owner]) then
    found[#found + 1] = id
  end
end
return {#ids, found}
"""
)

PURGE = (
    _WHEN_FULL_TOO
    + """
-- ARGV: before, size. Forgets up to `size` sessions that ended before; returns how many.
local ids = redis.call('ZRANGEBYSCORE', 'ntm:ended', '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local request = redis.call('HGET', 'ntm:session:' .. id, 'request')
  redis.call('DEL', 'ntm:session:' .. id, 'ntm:request:' .. request)
  redis.call('ZREM', 'ntm:ended', id)
end
return #ids
"""
)

BEAT = (
    _WHEN_FULL_TOO
    + """
-- ARGV: replica, lease in ms, longest gap in us that counts, whether the lease begins. Returns nothing if the lease has
-- lapsed; else the service time in us, and the time as seconds and microseconds.
local lease = 'ntm:replica:' .. ARGV[1]
if ARGV[4] == '1' then
  redis.call('SET', lease, '', 'PX', ARGV[2])
elseif redis.call('PEXPIRE', lease, ARGV[2]) == 0 then
  return false
end
local now = redis.call('TIME')
local now_us = now[1] * 1000000 + now[2]
local clock = redis.call('HMGET', 'ntm:clock', 'service_us', 'beat_us')
local gap_us = math.max(0, math.min(now_us - (clock[2] or now_us), ARGV[3]))
local service_us = string.format('%.0f', (clock[1] or 0) + gap_us)
redis.call('HSET', 'ntm:clock', 'service_us', service_us, 'beat_us', string.format('%.0f', now_us))
return {service_us, now[1], now[2]}
"""
)

RELEASE = (
    _WHEN_FULL_TOO
    + """
-- ARGV: replica, id.
local key = 'ntm:session:' .. ARGV[2]
if redis.call('HGET', key, 'owner') == ARGV[1] then
  redis.call('HDEL', key, 'owner')
end
"""
)
